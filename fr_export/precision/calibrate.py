"""Calibrate a system: record what it generates, then observe each model in fp32 on the tokens that it serves."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.calibration.observe import observe
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText, record
from fusionroute.calibration.serving_masks import serving_masks
from fusionroute.calibration.side_by_side import ReadTogether, SideBySide
from fusionroute.calibration.table import Table
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.batch_dimension import batched
from fusionroute.fr_export.graphs.decoder_blocks import matrices, reader
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.stages import stages as staged
from fusionroute.fr_export.precision.concurrency import Advance, Concurrency, memory_of
from fusionroute.fr_export.precision.kv_scales import caches
from fusionroute.fr_export.precision.products import coarse_products, multiply
from fusionroute.runtime import files
from fusionroute.runtime.backends.ort_cpu import TARGET as CPU
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.manifest import Manifest, Variant
from fusionroute.runtime.options import fusion_coefficients
from fusionroute.runtime.prompt import PromptEncoder

VERSION = 5  # of this computation: raising it invalidates every cached result
NEW_TOKENS = 64
RANDOM_PROMPT = 32  # tokens of a prompt for a system without a tokenizer
TOGETHER = 8  # texts recorded before they are saved again


def cache_folder() -> Path:
    """Where unfinished and finished calibrations are kept: `fusionroute/calibration` in $XDG_CACHE_HOME, else in
    ~/.cache.
    """
    return files.cache_folder() / "calibration"


def calibrate(
    system: System,
    graphs: dict[str, Graph],
    prompts: list[str],
    fusion: FusionSettings,
    bundle: Callable[[], Path],
    precision: str,
    cache: Path,
    stages: Stages,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    together: Sequence[str] = (),
) -> Table:
    """Routing-aware statistics of every model of a system.

    `graphs` are the traces by model. `bundle` writes a complete bundle of the same system, which generates in `precision`
    and reads the texts of the experts `together` in one graph with the router's; it is not called where all texts are
    kept. Texts and finished models are kept in `cache`/IDENTITY, so that an interrupted or repeated call goes on from there;
    files there that are broken are made again, and where nothing can be written it works without. `new_tokens` per
    prompt are cut to half of the context. Raises InputError where a model's activations are not finite, BundleError and
    UnavailableError as `FusionRuntime.load` does.
    """
    new_tokens = min(new_tokens, system.max_seq_len // 2)
    identity = identify(system, graphs, fusion, prompts, precision, new_tokens, seed, together)
    cached = Cache(cache / identity, identity)
    texts = recorded(bundle, precision, asked(system, prompts, seed), new_tokens, seed, cached, stages)
    cut = {name: staged(graph) for name, graph in graphs.items()}

    def observed(model: Checkpoint, advance: Advance) -> dict[str, Observer]:
        observers = cached.table(f"model-{model.name}").models.get(model.name)
        if observers is not None:
            stages.note(f"resumed: calibration of {model.name}")
            advance(len(cut[model.name]))
            return observers
        number = system.models.index(model)
        masks = serving_masks(texts, number - 1 if number else None)
        states = cached.folder / f"model-{model.name}.states"
        embed, read = reader(graphs[model.name], model.weights)
        try:
            observers = observe(
                cut[model.name], texts, masks, embed, read, advance, states, f"{identity}/{model.name}", threads=concurrency.threads, multiply=multiply
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{model.where} cannot be calibrated: {error}") from error
        cached.keep(f"model-{model.name}", Table([], {model.name: observers}, identity))
        return observers

    concurrency = Concurrency.of(len(system.models), max(map(memory_of, graphs.values())))
    with stages.stage("calibrating", sum(map(len, cut.values()))) as advance, coarse_products():
        statistics = concurrency.each(observed, system.models, advance)
    models = {model.name: own for model, own in zip(system.models, statistics, strict=True)}
    table = Table(texts, models, identity)
    check(table, system, graphs)
    return table


def check(table: Table, system: System, graphs: dict[str, Graph]) -> None:
    """Refuse a table that was made for another system. `graphs` are the traces by model.

    Raises InputError where names of models or matrices, the widths of these, token ids or experts do not fit.
    """
    mend = "calibrate this system instead"
    names = [model.name for model in system.models]
    table.check_models(names)
    for name in names:
        expected, widths = matrices(graphs[name]), {matrix: len(seen.channel_absmax) for matrix, seen in table.models[name].items()}
        if any(cache in widths for cache in caches(graphs[name])):  # tables of older versions have none
            expected |= caches(graphs[name])
        if different := sorted(expected.keys() ^ widths.keys()):
            whose = "lacks" if different[0] in expected else "has more than the model, such as"
            raise InputError(f"The calibration table of {name} {whose} the matrix {different[0]}: {mend}.")
        for matrix, width in expected.items():
            if widths[matrix] != width:
                raise InputError(f"The calibration table of {name} has {widths[matrix]} channels for {matrix}, the model {width}: {mend}.")
    for text in table.texts:
        if len(text.ids) and not 0 <= text.ids.min() <= text.ids.max() < system.vocab_size:
            raise InputError(f"The calibration table holds token ids outside the vocabulary of {system.vocab_size}: {mend}.")
        if text.experts.max(initial=-1) >= len(system.experts) or text.experts.min(initial=-1) < -1 or len(text.experts) != len(text.ids):
            raise InputError(f"The calibration table holds texts that were not answered by {len(system.experts)} expert(s): {mend}.")


def identify(
    system: System, graphs: dict[str, Graph], fusion: FusionSettings, prompts: Sequence[str], precision: str, new_tokens: int, seed: int,
    together: Sequence[str] = (),
) -> str:  # fmt: skip
    """A digest of everything that a calibration depends on; checkpoint files count by path, size and time of change."""
    models = []
    for model in system.models:
        tokenizer = model.file("tokenizer.json")
        stamps = [stamp(file) for file in sorted(model.files | ({tokenizer} if tokenizer else set()))]
        models.append([model.name, model.config.to_dict(), matrices(graphs[model.name]), stamps])
    about: dict[str, Any] = {
        "version": VERSION, "family": system.family.name, "models": models, "vocab_size": system.vocab_size,
        "max_seq_len": system.max_seq_len, "head": hashlib.sha256(system.head.weight.tobytes() + system.head.bias.tobytes()).hexdigest(),
        "fusion": fusion.fusion, "lam": fusion.lam, "ends": system.router.end_tokens, "precision": precision,
        "prompts": list(prompts), "new_tokens": new_tokens, "seed": seed,
    }  # fmt: skip
    if together:
        about["together"] = list(together)  # those round otherwise
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def stamp(file: Path) -> tuple[str, int, int]:
    """Identifies a file without reading it: path, size and time of change."""
    resolved = file.resolve()
    about = resolved.stat()
    return str(resolved), about.st_size, about.st_mtime_ns


def asked(system: System, prompts: Sequence[str], seed: int) -> list[str | list[int]]:
    """The prompts to generate from; as many of seeded random ids for a system without a tokenizer."""
    if system.router.tokenizer is not None:
        return list(prompts)
    length = min(RANDOM_PROMPT, max(1, system.max_seq_len // 2))
    draw = np.random.default_rng(seed).integers(0, system.vocab_size, (len(prompts), length))
    return [[int(i) for i in row] for row in draw]


def recorded(
    folder: Callable[[], Path], precision: str, prompts: list[str | list[int]], new_tokens: int, seed: int, cached: "Cache", stages: Stages
) -> list[RecordedText]:
    """One text per prompt. Every text has its own random stream, so the texts of an interrupted call can be reused."""
    texts = cached.table("texts").texts
    if texts:
        stages.note(f"resumed: {len(texts)} of {len(prompts)} recorded texts")
    if len(texts) == len(prompts):
        return texts
    bundle = Bundle.open(folder())
    with stages.stage("recording what the system does", len(prompts)) as advance:
        advance(len(texts))
        manifest = bundle.manifest
        encoder, room = PromptEncoder(bundle), manifest.max_seq_len - new_tokens
        ids = [encoder.ids(prompt)[:room] for prompt in prompts[len(texts) :]]
        variant = next(each for each in manifest.variants if (each.target, each.precision) == (CPU, precision))
        graphs = [
            ReadTogether(bundle.folder / path, batched(bundle.folder / path), numbers)
            for path, numbers in read_together(manifest, variant).items()
        ]
        coefficients, ends = fusion_coefficients(manifest.fusion, manifest.lam), frozenset(manifest.eos_token_ids)
        with SideBySide(graphs, max(map(len, ids)) + new_tokens, len(ids)) as models:
            for text in record(models, ids, new_tokens, ends, coefficients, seed + len(texts)):
                texts = [*texts, text]
                advance(1)
                if len(texts) % TOGETHER == 0 or len(texts) == len(prompts):
                    cached.keep("texts", Table(texts, {}, cached.identity))
    return texts


def read_together(manifest: Manifest, variant: Variant) -> dict[str, list[int]]:
    """The graphs of a variant, and the numbers of the models that each of them is of: several, where these share a base."""
    numbers: dict[str, list[int]] = {}
    for number, model in enumerate(manifest.models):
        numbers.setdefault(variant.graphs[model.name], []).append(number)
    return numbers


class Cache:
    """Partial tables of one calibration, by name. Broken files count as missing; failures to write are ignored."""

    def __init__(self, folder: Path, identity: str):
        self.folder, self.identity = folder, identity

    def table(self, name: str) -> Table:
        """What was kept under a name, or an empty table."""
        with contextlib.suppress(InputError):
            table = Table.load(self.folder / f"{name}.safetensors")
            if table.identity == self.identity:
                return table
        return Table([], {}, self.identity)

    def keep(self, name: str, table: Table) -> None:
        """Keep a table under a name, in place of an older one."""
        with contextlib.suppress(InputError):
            table.save(self.folder / f"{name}.safetensors")
