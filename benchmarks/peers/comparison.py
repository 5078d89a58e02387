"""The rows of the comparison, precision by precision: one model alone, and fused systems."""

import json
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from math import exp
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

from rich.console import Console

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.text import Text
from peers.environments import OURS, PEERS, Peer, python
from peers.made import model
from peers.process import Measured, PeerError, Worker, in_turns, times, working

Row = dict[str, Any]
PROMPT, DECODED, LONG = 64, 64, 512  # tokens
CONTEXT = 1024  # tokens that a text may have
JUDGED = 8  # texts of LONG tokens that perplexity is measured on
SWEPT = 2  # rounds that choose the workaround's settings
DEFAULT = "default settings"
WORKAROUND = {"fp32": "fp32", "int8": "int8", "int4": "block 32"}  # the forms of onnxruntime-genai that are fused
Setting = tuple[int | None, dict[str, str]]  # threads of each model (None: the library's choice), entries of the session's configuration
CONSOLE = Console(stderr=True, highlight=False)
NAMED = {peer.module: peer for peer in PEERS}


def settings(threads: int) -> dict[str, Setting]:
    """What is tried for the workaround: threads, and how those without work wait."""
    return {
        DEFAULT: (None, {}),
        "1 thread": (1, {}),
        f"{threads} threads": (threads, {}),
        f"{threads} threads, no spinning": (threads, {"session.intra_op.allow_spinning": "0"}),
        f"{threads} threads, spinning ends with a run": (threads, {"session.force_spinning_stop": "1"}),
    }


@dataclass(frozen=True)
class Comparison:
    """A system as checkpoints and as a bundle; `work` keeps what is made."""

    router: Path
    experts: dict[str, Path]
    bundle: Path
    work: Path
    threads: int
    rounds: int

    def texts(self) -> list[list[int]]:
        """Texts of LONG tokens: first those that perplexity is measured on."""
        ids = Text.load(self.router / "tokenizer.json").encode("\n\n".join(topics[name] for name in sorted(topics)))
        return [ids[start : start + LONG] for start in range(0, len(ids) - LONG, LONG)]

    def prompts(self, rounds: int) -> tuple[list[list[int]], list[list[int]]]:
        """Short and long prompts of one round to warm up and so many rounds: none twice, so that no cache of prompts can help."""
        texts = self.texts()[JUDGED:]
        return [text[:PROMPT] for text in texts[rounds + 1 :][: rounds + 1]], texts[: rounds + 1]

    def start(self, name: str, peer: Peer, **request: Any) -> Worker:
        """A process that has loaded what `request` names. Raises PeerError."""
        log = self.work / "log" / f"{name.replace(' ', '-')}.txt"
        return Worker(python(self.work, peer.environment), peer.module, log, context=CONTEXT, **request)

    # -- one model ----------------------------------------------------------------------------------------------------

    def alone(self, precision: str) -> list[Row]:
        """The router alone in every peer that has the precision, in turns."""
        rows: list[Row] = []
        with working({}) as workers:
            for peer in PEERS:
                for form in peer.forms.get(precision, ()):
                    name = f"{peer.name} {form}"
                    try:
                        folder = model(self.work, peer, form, self.router, self.bundle)
                        row = {"name": name, "runtime": peer.name, "form": form, "precision": precision}
                        row["perplexity"] = self.perplexity(name, peer, form, folder)
                        workers[name] = self.start(name, peer, folder=str(folder), form=form, threads=self.threads)
                        rows.append(row)
                    except PeerError as error:
                        CONSOLE.print(f"{name} is left out: {error}")
            CONSOLE.print(f"{precision}, one model: {', '.join(workers)}")
            found = in_turns(workers, *self.prompts(self.rounds), DECODED)
        return [row | numbers(found, row["name"], f"{OURS} {precision}") for row in rows]

    def perplexity(self, name: str, peer: Peer, form: str, folder: Path) -> float:
        """Of the first JUDGED texts, read at once; in a process of its own, and kept. Raises PeerError."""
        made = folder / ("manifest.json" if peer.name == OURS else "made.txt")
        mark = sha256(made.read_bytes() if made.is_file() else str(folder.resolve()).encode()).hexdigest()
        kept = self.work / "perplexity.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        key = f"{name} {mark}"
        if key not in known:
            CONSOLE.print(f"{name}: perplexity")
            worker = self.start(f"perplexity {name}", peer, folder=str(folder), form=form, threads=self.threads)
            with working({name: worker}):
                loss = worker.ask("loss", texts=self.texts()[:JUDGED])
            known[key] = exp(loss["nats"] / loss["count"])
            kept.write_text(json.dumps(known, indent=1))
        return float(known[key])

    # -- fused --------------------------------------------------------------------------------------------------------

    def fused(self, precision: str) -> list[Row]:
        """Our fused system, the workaround with default and with its quickest settings, and in fp32 torch, in turns."""
        genai, torch = NAMED["genai"], NAMED["torch"]
        checkpoints = {"router": self.router, **self.experts}
        lam = Bundle.open(self.bundle).manifest.lam
        form = WORKAROUND[precision]
        folders = {name: str(model(self.work, genai, form, folder, self.bundle)) for name, folder in checkpoints.items()}

        def workaround(setting: str) -> Worker:
            threads, entries = tried[setting]
            request = {"folder": folders, "form": form, "head": str(self.router), "lam": lam, "threads": threads, "entries": entries}
            return self.start(f"fused {genai.name} {form} {setting}", genai, **request)

        tried = settings(self.threads)
        swept = {setting: self.sweep(setting, workaround) for setting in tried}
        best = min(swept, key=lambda setting: swept[setting])
        CONSOLE.print(f"{precision}, fused: {', '.join(f'{setting} {DECODED / seconds:.1f}/s' for setting, seconds in swept.items())}")
        ours = f"{OURS} {precision}"
        rows = [{"name": ours, "runtime": OURS, "settings": ""}]
        with working({}) as workers:
            workers[ours] = self.start(
                f"fused {ours}", NAMED["ours"], folder=str(self.bundle), form=precision, threads=self.threads, fused=True
            )
            for setting in dict.fromkeys((best, DEFAULT)):
                rows.append({"name": setting, "runtime": genai.name, "settings": setting})
                workers[setting] = workaround(setting)
            if precision == "fp32":
                rows.append({"name": torch.name, "runtime": torch.name, "settings": f"{self.threads} threads"})
                request = {"folder": {name: str(folder) for name, folder in checkpoints.items()}, "form": "fp32", "lam": lam}
                workers[torch.name] = self.start("fused torch", torch, threads=self.threads, **request)
            found = in_turns(workers, *self.prompts(self.rounds), DECODED)
        speeds = {setting: DECODED / seconds for setting, seconds in swept.items()}
        return [
            row
            | {"precision": precision, "swept": speeds, "changes": changes(found[row["name"]].experts)}
            | numbers(found, row["name"], ours)
            for row in rows
        ]

    def sweep(self, setting: str, opened: Any) -> float:
        """Seconds of decoding with one setting of the workaround: median of few rounds."""
        with working({setting: opened(setting)}) as workers:
            return median(in_turns(workers, *self.prompts(SWEPT), DECODED)[setting].decode)


def numbers(found: dict[str, Measured], name: str, ours: str) -> Row:
    """Medians of a row, and how many times as long as ours it took (> 1: ours is faster)."""
    own, measured = found[ours], found[name]
    return {
        "tokens_per_second": DECODED / median(measured.decode),
        "prefill_per_second": LONG / median(measured.prefill),
        "decode_times": times(measured.decode, own.decode),
        "prefill_times": times(measured.prefill, own.prefill),
        "peak": measured.peak,
        "idle": measured.idle,
        "alike": alike(measured.tokens, own.tokens),
        "seconds": {"decode": measured.decode, "prefill": measured.prefill},
    }


def changes(texts: list[list[str]]) -> float:
    """How many tokens of a text had another expert than the one before: the mean."""
    return sum(one != other for experts in texts for one, other in pairwise(experts)) / len(texts)


def alike(texts: list[list[int]], others: list[list[int]]) -> float:
    """Share of the texts before their first difference: what comes behind it is another text."""
    until = [
        next((n for n, (one, other) in enumerate(zip(*pair, strict=True)) if one != other), len(pair[0]))
        for pair in zip(texts, others, strict=True)
    ]
    return sum(until) / sum(map(len, texts))
