"""Merge whole models of one base, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from safetensors.torch import save_file

from fusionroute.fr_export.bundle.staged_folder import Staging
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint, empty_model, shapes_of
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.graphs.trace import IDENTITY
from fusionroute.fr_export.training.merge.formulas import Formula, formula
from fusionroute.fr_export.training.router import DTYPES, SHARD, copy_texts, stored_dtype
from fusionroute.runtime.errors import InputError


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
    """Write the merged model to `out`, which appears only when complete.

    Config, tokenizer and dtype are the first expert's. `scale` is used by task_arithmetic and dare, `drop` and `seed`
    by dare: equal seeds give equal weights. `base` and `experts` are folders or hub ids; experts may be adapters of the
    base. Raises InputError for settings
    out of range, for models that are not of one architecture and vocabulary, and where `out` exists.
    """
    combine = formula(method, scale, drop, seed)
    if not experts:
        raise InputError("There is nothing to merge: name at least one expert with --expert.")
    with MergedModelStaging(out, force=False) as staging, torch.no_grad():
        start = replace(opened := Checkpoint.open("base", str(base)), where=f"The base ({opened.folder})")
        models = [Checkpoint.open(Path(source).name, str(source), base=str(base)) for source in experts]
        for model in models:
            _check(start, model)
        first = models[0]
        shapes, dtype = shapes_of(empty_model(first.config)), DTYPES[stored_dtype(first)]
        with (display or Stages(Console(quiet=True))).stage(f"merging {len(models)} experts", len(shapes)) as advance:
            for file, names in _shards(shapes, dtype, staging.folder):
                save_file({name: _merged(name, start, models, combine, dtype, advance) for name in names}, file, {"format": "pt"})
                file.chmod(0o644)  # safetensors writes for the owner only
        copy_texts(first, staging.folder)
        shutil.copyfile(first.texts["config.json"], staging.folder / "config.json")


class MergedModelStaging(Staging):
    """The folder of a merged model. It replaces nothing but an empty folder."""

    mark = "config.json"

    def check(self) -> None:
        """Raise InputError unless `out` is missing or an empty folder."""
        if self.out.exists() and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise InputError(f"{self.out} exists, and a merge replaces nothing: name another folder with --out.")


def _check(base: Checkpoint, expert: Checkpoint) -> None:
    """Raise InputError unless both have one architecture and one vocabulary: only then do their weights correspond."""
    if base.family is not expert.family:
        raise InputError(
            f"{expert.where} is of family {expert.family.name}, the base of {base.family.name}: merge models that were fine-tuned from one base."
        )
    own, start = expert.config.to_dict(), base.config.to_dict()
    differing = sorted(key for key in own.keys() | start.keys() if key not in IDENTITY and own.get(key) != start.get(key))
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
    """The files to write, with the names of the tensors in each. Writes the index where there are several files."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file, names in shards.filename_to_tensors.items():
        yield folder / file, names


def _merged(
    name: str, base: Checkpoint, experts: Sequence[Checkpoint], combine: Formula, dtype: torch.dtype, advance: Callable[[float], None]
) -> torch.Tensor:
    """One merged tensor in `dtype`, computed slice by slice. Raises InputError where it overflows."""
    slices = zip(base.weights.rows(name), *(expert.weights.rows(name) for expert in experts), strict=True)
    with np.errstate(over="ignore", invalid="ignore"):  # the check below reports it
        merged = torch.cat([torch.from_numpy(combine(first, rest)).to(dtype) for first, *rest in slices])
    if not merged.isfinite().all():
        raise InputError(f"The merged tensor '{name}' exceeds the range of {dtype}: choose a smaller scale.")
    advance(1)
    return merged
