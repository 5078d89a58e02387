"""The rows of the comparison, precision by precision: one model alone, and fused systems."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from math import exp
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.peers.environments import OURS, PEERS, Peer, python
from benchmarks.peers.models import MARKER, model_folder
from benchmarks.peers.process import Measured, PeerError, Worker, in_turns, slowdown, working
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.text import Text

Row = dict[str, Any]
PROMPT, DECODED, LONG = 64, 64, 512  # tokens
CONTEXT = 1024  # longest text, tokens
JUDGED = 8  # texts of LONG tokens for perplexity
SWEPT = 2  # rounds for choosing the workaround's settings
DEFAULT = "default settings"
WORKAROUND = {"fp32": "fp32", "int8": "int8", "int4": "block 32"}  # the forms of onnxruntime-genai that are fused
Setting = tuple[int | None, dict[str, str]]  # threads per model (None: the library chooses), session options
CONSOLE = Console(stderr=True, highlight=False)
PEER_OF_MODULE = {peer.module: peer for peer in PEERS}


def settings(threads: int) -> dict[str, Setting]:
    """The settings that the workaround is tried with: threads, and how idle threads wait."""
    return {
        DEFAULT: (None, {}),
        "1 thread": (1, {}),
        f"{threads} threads": (threads, {}),
        f"{threads} threads, no spinning": (threads, {"session.intra_op.allow_spinning": "0"}),
        f"{threads} threads, spinning ends with a run": (threads, {"session.force_spinning_stop": "1"}),
    }


@dataclass(frozen=True)
class Comparison:
    """A system as checkpoints and as a bundle; `work` keeps environments, models and perplexities."""

    router: Path
    experts: dict[str, Path]
    bundle: Path
    work: Path
    threads: int
    rounds: int

    def texts(self) -> list[list[int]]:
        """Texts of LONG tokens each; the first JUDGED are those for perplexity."""
        ids = Text.load(self.router / "tokenizer.json").encode("\n\n".join(topics[name] for name in sorted(topics)))
        return [ids[start : start + LONG] for start in range(0, len(ids) - LONG, LONG)]

    def prompts(self, rounds: int) -> tuple[list[list[int]], list[list[int]]]:
        """Short and long prompts of a warm-up round and of `rounds` more.

        All differ, so that a prompt cache gains nothing.
        """
        texts = self.texts()[JUDGED:]
        return [text[:PROMPT] for text in texts[rounds + 1 :][: rounds + 1]], texts[: rounds + 1]

    def start(self, name: str, peer: Peer, **request: Any) -> Worker:
        """A process that has loaded the model of `request`. Raises PeerError."""
        log = self.work / "log" / f"{name.replace(' ', '-')}.txt"
        return Worker(python(self.work, peer.environment), peer.module, log, context=CONTEXT, **request)

    # -- one model ----------------------------------------------------------------------------------------------------

    def alone(self, precision: str) -> list[Row]:
        """The router alone, in turns, in every peer that has the precision."""
        rows: list[Row] = []
        with working({}) as workers:
            for peer in PEERS:
                for form in peer.forms.get(precision, ()):
                    name = f"{peer.name} {form}"
                    try:
                        folder = model_folder(self.work, peer, form, self.router, self.bundle)
                        row: Row = {"name": name, "runtime": peer.name, "form": form, "precision": precision}
                        row["perplexity"] = self.perplexity(name, peer, form, folder)
                        workers[name] = self.start(name, peer, folder=str(folder), form=form, threads=self.threads)
                        rows.append(row)
                    except PeerError as error:
                        CONSOLE.print(f"{name} is left out: {error}")
            CONSOLE.print(f"{precision}, one model: {', '.join(workers)}")
            measured = in_turns(workers, *self.prompts(self.rounds), DECODED)
        return [row | numbers(measured, row["name"], f"{OURS} {precision}") for row in rows]

    def perplexity(self, name: str, peer: Peer, form: str, folder: Path) -> float:
        """Perplexity of the first JUDGED texts, each read in one pass, in a process of its own. Measured once and kept.

        Raises PeerError.
        """
        description = folder / ("manifest.json" if peer.name == OURS else MARKER)
        digest = sha256(description.read_bytes() if description.is_file() else str(folder.resolve()).encode()).hexdigest()
        cache = self.work / "perplexity.json"
        known = json.loads(cache.read_text()) if cache.is_file() else {}
        key = f"{name} {digest}"
        if key not in known:
            CONSOLE.print(f"{name}: perplexity")
            worker = self.start(f"perplexity {name}", peer, folder=str(folder), form=form, threads=self.threads)
            with working({name: worker}):
                loss = worker.ask("loss", texts=self.texts()[:JUDGED])
            known[key] = exp(loss["nats"] / loss["count"])
            cache.write_text(json.dumps(known, indent=1))
        return float(known[key])

    # -- fused --------------------------------------------------------------------------------------------------------

    def fused(self, precision: str) -> list[Row]:
        """In turns: our fused system, the workaround with its default and its fastest settings, and torch in fp32."""
        genai, torch = PEER_OF_MODULE["genai"], PEER_OF_MODULE["torch"]
        checkpoints = {"router": self.router, **self.experts}
        lam = Bundle.open(self.bundle).manifest.lam
        form = WORKAROUND[precision]
        folders = {name: str(model_folder(self.work, genai, form, folder, self.bundle)) for name, folder in checkpoints.items()}

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
                f"fused {ours}", PEER_OF_MODULE["fusionroute"], folder=str(self.bundle), form=precision, threads=self.threads, fused=True
            )
            for setting in dict.fromkeys((best, DEFAULT)):
                rows.append({"name": setting, "runtime": genai.name, "settings": setting})
                workers[setting] = workaround(setting)
            if precision == "fp32":
                rows.append({"name": torch.name, "runtime": torch.name, "settings": f"{self.threads} threads"})
                request = {"folder": {name: str(folder) for name, folder in checkpoints.items()}, "form": "fp32", "lam": lam}
                workers[torch.name] = self.start("fused torch", torch, threads=self.threads, **request)
            measured = in_turns(workers, *self.prompts(self.rounds), DECODED)
        speeds = {setting: DECODED / seconds for setting, seconds in swept.items()}
        return [
            row
            | {"precision": precision, "swept": speeds, "changes": changes(measured[row["name"]].experts)}
            | numbers(measured, row["name"], ours)
            for row in rows
        ]

    def sweep(self, setting: str, start: Callable[[str], Worker]) -> float:
        """Seconds of decoding with one setting of the workaround, median of SWEPT rounds."""
        with working({setting: start(setting)}) as workers:
            return median(in_turns(workers, *self.prompts(SWEPT), DECODED)[setting].decode)


def numbers(measured: dict[str, Measured], name: str, ours: str) -> Row:
    """Medians of a row, and how many times as long as ours it took (> 1: ours is faster)."""
    own, row = measured[ours], measured[name]
    return {
        "tokens_per_second": DECODED / median(row.decode),
        "prefill_per_second": LONG / median(row.prefill),
        "decode_times": slowdown(row.decode, own.decode),
        "prefill_times": slowdown(row.prefill, own.prefill),
        "peak": row.peak,
        "idle": row.idle,
        "alike": alike(row.tokens, own.tokens),
        "seconds": {"decode": row.decode, "prefill": row.prefill},
    }


def changes(texts: list[list[str]]) -> float:
    """Mean number of tokens per text whose expert differs from that of the token before."""
    return sum(one != other for experts in texts for one, other in pairwise(experts)) / len(texts)


def alike(texts: list[list[int]], others: list[list[int]]) -> float:
    """Share of the tokens before the first difference of two texts; after it they are different texts."""
    until = [
        next((n for n, (one, other) in enumerate(zip(*pair, strict=True)) if one != other), len(pair[0]))
        for pair in zip(texts, others, strict=True)
    ]
    return sum(until) / sum(map(len, texts))
