"""Merge experts that were fine-tuned from one base into a single model: the baselines that FusionRoute is compared with.

python -m fr_export.training.merge --method dare --base SRC --expert SRC --expert SRC --scale 0.5 --drop 0.5 --seed 0 --out DIR

Written by hand because mergekit, which computes the same, brings 400 MB of packages (datasets, pandas, pyarrow, scipy) for three formulas.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console

from fusionroute.fr_export.bundle.staged_folder import Staging
from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.errors import InputError

try:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint, read_config, read_json
    from fusionroute.fr_export.graphs.trace import IDENTITY
    from fusionroute.fr_export.training.router import DTYPES, SHARD, copy_texts, stored_dtype
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: Merging needs the package '{error.name}': install the extra 'export' (pip install 'fusionroute[export]').")

METHODS = {"average": (), "task_arithmetic": ("scale",), "dare": ("scale", "drop", "seed")}  # and the settings of each
Values = npt.NDArray[np.float32]
Formula = Callable[[Values, Sequence[Values]], Values]


def average(base: Values, experts: Sequence[Values]) -> Values:
    """The mean of the experts' float32 values, all of one shape (model soups, arXiv:2203.05482); the base has no say."""
    merged: Values = np.mean(experts, axis=0, dtype=np.float32)
    return merged


def task_arithmetic(base: Values, experts: Sequence[Values], scale: float) -> Values:
    """base + scale · Σ (expert − base), in float32 (arXiv:2212.04089). All values are of one shape, the result's."""
    return _added(base, [expert - base for expert in experts], scale)


def dare(base: Values, experts: Sequence[Values], scale: float, drop: float, random: np.random.Generator) -> Values:
    """Task arithmetic on sparse differences, in float32 (arXiv:2311.03099).

    Each entry of each expert − base is dropped with probability `drop` and divided by 1 − drop where it is kept, so that its mean stays.
    """
    kept = [(expert - base) * (random.random(base.shape, np.float32) >= drop) / np.float32(1 - drop) for expert in experts]
    return _added(base, kept, scale)


def _added(base: Values, differences: Sequence[Values], scale: float) -> Values:
    merged: Values = base + np.float32(scale) * np.sum(differences, axis=0, dtype=np.float32)
    return merged


def formula(method: str, scale: float = 1.0, drop: float = 0.5, seed: int = 0) -> Formula:
    """The method with its settings. Raises InputError for an unknown one, and where a setting is out of range."""
    if method not in METHODS:
        raise InputError(f"Unknown method '{method}'; expected {', '.join(METHODS)}.")
    if not math.isfinite(scale):
        raise InputError(f"scale={scale} is no finite number; expected one such as 0.5.")
    if not 0 <= drop < 1:
        raise InputError(f"drop={drop} is out of range; expected a probability from 0 to below 1.")
    if seed < 0:
        raise InputError(f"seed={seed} is negative; expected a whole number from 0.")
    if method == "average":
        return average
    if method == "task_arithmetic":
        return partial(task_arithmetic, scale=scale)
    return partial(dare, scale=scale, drop=drop, random=np.random.default_rng(seed))


def merge(
    method: str,
    base: str | Path,
    experts: Sequence[str | Path],
    out: Path,
    *,
    scale: float = 1.0,
    drop: float = 0.5,
    seed: int = 0,
    display: Stages | None = None,
) -> None:
    """Write the merged model to `out`, which appears only when complete: the first expert's folder (config, texts, dtype) with other weights.

    `scale` is that of task_arithmetic and dare, `drop` and `seed` are dare's: equal seeds give equal weights. Sources are folders or hub ids.
    Raises InputError for settings out of range, for models that are not of one architecture and vocabulary, and where `out` exists.
    """
    combine = formula(method, scale, drop, seed)
    if not experts:
        raise InputError("There is nothing to merge: name at least one expert with --expert.")
    with _Out(out, force=False) as staging, torch.no_grad():
        start = replace(opened := _open("base", base), where=f"The base ({opened.folder})")
        models = [_open(locate(str(source)).name, source) for source in experts]
        for model in models:
            _check(start, model)
        first = models[0]
        shapes, dtype = read_config(first.folder, first.where)[1], DTYPES[stored_dtype(first)]
        with (display or Stages(Console(quiet=True))).stage(f"merging {len(models)} experts", len(shapes)) as advance:
            for file, names in _shards(shapes, dtype, staging.folder):
                save_file({name: _merged(name, start, models, combine, dtype, advance) for name in names}, file, {"format": "pt"})
                file.chmod(0o644)  # safetensors writes for the owner only
        copy_texts(first.folder, staging.folder)
        shutil.copyfile(first.folder / "config.json", staging.folder / "config.json")


class _Out(Staging):
    """The merged model's folder; nothing that exists is replaced."""

    def check(self) -> None:
        """Only a new or empty folder is ours to write."""
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise InputError(f"{self.out} exists, and a merge replaces nothing: name another folder with --out.")


def _open(name: str, source: str | Path) -> Checkpoint:
    """A checkpoint of whichever family its config.json says."""
    folder = locate(str(source))
    found = read_json(folder / "config.json", f"{folder} is not a Hugging Face model folder").get("model_type")
    family = next((family for family in FAMILIES.values() if family.model_type == found), None)
    if family is None:
        raise InputError(f"{folder} is of model type {found!r}; expected {' or '.join(f.model_type for f in FAMILIES.values())}.")
    return Checkpoint.open(name, str(folder), family)


def _check(base: Checkpoint, expert: Checkpoint) -> None:
    """Weights can be added up only where they mean the same: one architecture, one vocabulary."""
    if base.family is not expert.family:
        raise InputError(
            f"{expert.where} is of family {expert.family.name}, the base of {base.family.name}: merge models that were fine-tuned from one base."
        )
    mine, other = expert.config.to_dict(), base.config.to_dict()
    differing = sorted(key for key in mine.keys() | other.keys() if key not in IDENTITY and mine.get(key) != other.get(key))
    if differing:
        raise InputError(
            f"{expert.where} differs from the base in {', '.join(differing)} of config.json: merge models that were fine-tuned from one base."
        )
    if base.vocabulary is not None and expert.vocabulary is not None and base.vocabulary != expert.vocabulary:
        entries = len(base.vocabulary.items() ^ expert.vocabulary.items())
        raise InputError(
            f"{expert.where} has another vocabulary than the base ({entries} entries differ): merge models that share their tokenizer."
        )


def _shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The files to write and the names of the tensors in each; writes the index where there are several."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in plan.filename_to_tensors.items():
        yield folder / file, names


def _merged(
    name: str, base: Checkpoint, experts: Sequence[Checkpoint], combine: Formula, dtype: torch.dtype, advance: Callable[[float], None]
) -> torch.Tensor:
    """One tensor, computed slice by slice."""
    slices = zip(base.weights.rows(name), *(expert.weights.rows(name) for expert in experts), strict=True)
    with np.errstate(over="ignore", invalid="ignore"):  # the check below says it better
        merged = torch.cat([torch.from_numpy(combine(first, rest)).to(dtype) for first, *rest in slices])
    if not merged.isfinite().all():
        raise InputError(f"The merged tensor '{name}' exceeds the range of {dtype}: choose a smaller scale.")
    advance(1)
    return merged


def main(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    base: Annotated[str, typer.Option(help="What the experts were fine-tuned from: a folder or hub id.")],
    expert: Annotated[
        list[str], typer.Option(help="An expert: a folder or hub id; repeat. The first one gives config, tokenizer and dtype.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    scale: Annotated[float | None, typer.Option(help="Of the summed differences from the base (task_arithmetic, dare); default 1.")] = None,
    drop: Annotated[float | None, typer.Option(help="Probability of dropping a difference (dare); default 0.5.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is dropped (dare); default 0.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Merge experts of one base into a single model: average, task arithmetic or DARE."""
    given = (("scale", scale), ("drop", drop), ("seed", seed))
    settings: dict[str, Any] = {name: value for name, value in given if value is not None}
    try:
        formula(method, **settings)
    except InputError as error:
        raise typer.BadParameter(str(error)) from None
    if unused := [f"--{name}" for name in settings if name not in METHODS[method]]:
        raise typer.BadParameter(f"{method} does not use {unused[0]}: leave it out")
    display = Stages(Console(stderr=True))
    missing = "Merging needs the package '{}': install the extra 'export' (pip install 'fusionroute[export]')."
    with one_sentence("merge", missing, out, "nothing was written", debug), display.progress:
        merge(method, base, expert, out, **settings, display=display)


if __name__ == "__main__":
    typer.run(main)
