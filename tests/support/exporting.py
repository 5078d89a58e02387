"""Exports made by tests, without the comparison that ends an export: tests make their own.

`python -m tests.support.exporting DIR` writes the bundles of tests/runtime, to run those tests without torch.
"""

import sys
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision.rank_budget import RankBudget
from tests.support.systems import Shape, make_system

ALL = ("fp32", "fp16", "bf16", "int8", "int4")


def export_system(
    folder: Path, shape: Shape, precisions: tuple[str, ...] = ALL, seed: int = 0, max_seq_len: int | None = None
) -> tuple[Path, System]:
    """Make a random system in `folder` and export it to `folder/bundle`."""
    router, experts = make_system(folder, shape, seed)
    bundle = export_checkpoints(folder / "bundle", shape, router, experts, precisions, max_seq_len)
    return bundle, System.open(FAMILIES[shape.family], router, experts, max_seq_len=max_seq_len)


def export_checkpoints(
    out: Path,
    shape: Shape,
    router: str,
    experts: dict[str, str],
    precisions: tuple[str, ...] = ALL,
    max_seq_len: int | None = None,
    calibration: str = "none",
    shared_base: bool = False,
    budget: RankBudget | None = None,
    leave_apart: bool = False,
    targets: tuple[str, ...] = ("ort:cpu",),
) -> Path:
    """Export given checkpoints to `out`."""
    request = Request(
        FAMILIES[shape.family], router, experts, precisions, targets, out, max_seq_len=max_seq_len, calibration=calibration,
        shared_base=shared_base, budget=budget, leave_apart=leave_apart,
    )  # fmt: skip
    with patch("fusionroute.fr_export.export.measure", return_value=({}, "a test compares it")):
        export(request, Stages(Console(quiet=True)))
    return out


def export_shipped(out: Path, family: str, precisions: tuple[str, ...]) -> Path:
    """Export the small trained system of a family that ships here to `out`."""
    preset = FAMILIES[family].preset("tiny")
    assert preset.router is not None
    return export_checkpoints(out, Shape(family), preset.router, dict(preset.experts), precisions)


def export_runtime_bundles(root: Path) -> list[Path]:
    """The bundles of tests/runtime: random weights, which do not end their texts by themselves.

    Two systems of full models; one of adapters, with one base for all of them, and once more with merged models; and one
    of adapters that change no norms, so that every expert may read in one pass.
    """
    shapes = [Shape(family, layers=1, experts=2, tokenizer=True) for family in ("llama3", "gemma2")]
    full = [export_system(root / shape.family, shape, ("fp32", "int8"))[0] for shape in shapes]
    return [*full, *export_adapters(root / "adapters"), export_segments(root / "segments")]


def export_adapters(root: Path) -> tuple[Path, Path]:
    """A system of three adapters with one base for all of them, and the same system as merged models."""
    from tests.support.adapters import make_adapted_system

    shape = Shape(layers=2, tokenizer=True)
    _, router, experts = make_adapted_system(root, shape, [{}, {"r": 3}, {"modules_to_save": ["input_layernorm", "norm"]}, {"r": 8}])
    shared, merged = (
        export_checkpoints(root / name, shape, router, experts, ("fp32", "int8", "int4"), shared_base=name == "shared")
        for name in ("shared", "merged")
    )
    return shared, merged


def export_segments(root: Path) -> Path:
    """A system of three adapters of low-rank factors alone, with one base for all of them."""
    from tests.support.adapters import make_adapted_system

    shape = Shape(layers=2, tokenizer=True)
    _, router, experts = make_adapted_system(root, shape, [{}, {"r": 3}, {"r": 5}, {"r": 8}])
    return export_checkpoints(root / "shared", shape, router, experts, ("fp32", "int8", "int4"), shared_base=True)


if __name__ == "__main__":
    print(":".join(map(str, export_runtime_bundles(Path(sys.argv[1])))))
