"""Several targets in one bundle: what is exported for each, and what becomes of variants that need a GPU."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import typer
from rich.console import Console

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.commands.variants import ALIASES, TARGET_HELP, parse_gpus, parse_precisions, parse_targets
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.verify.report import show_report
from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import FusionError, UnavailableError
from tests.support.stored_weights import StoredWeight, stored_weights
from tests.support.systems import Shape, make_system


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("targets")
    router, experts = make_system(folder, Shape("gemma2", experts=1, layers=1))
    return Request(FAMILIES["gemma2"], router, experts, ("fp32", "fp16", "bf16"), ("ort:cpu", "ort:cuda"), folder / "bundle", force=True)


def test_every_target_has_schemes_a_way_to_make_its_graph_and_help() -> None:
    named = (name.partition("[")[0] for name in TARGET_HELP)
    assert SCHEMES.keys() == TARGETS.keys() == {ALIASES.get(name, name) for name in named}


def test_a_bundle_for_both_targets_is_compared_where_it_runs_and_shares_its_weights(mixed: Request) -> None:
    report = export(mixed, quiet())
    Bundle.open(mixed.out).verify()
    assert json.loads((mixed.out / "report.json").read_text()) == report
    entries = {(entry["target"], entry["precision"]): entry for entry in report["variants"]}
    assert list(entries) == [
        *(("ort:cpu", precision) for precision in ("fp32", "fp16", "bf16")),
        *(("ort:cuda", precision) for precision in ("fp16", "bf16")),
    ]
    for (target, _), entry in entries.items():
        if target == "ort:cpu":
            assert entry["compared"]["decode"]["greedy_agreement"] > 0.9 and entry["not_compared"] is None
        else:
            assert entry["compared"] is None and entry["missed"] == []
            assert entry["not_compared"] == "graphs for ort:cuda need a GPU, and this comparison runs on the CPU"
    shown = io.StringIO()
    show_report(Console(file=shown, width=300), report, mixed.out)
    assert (
        "Not compared with torch: fp16 for ort:cuda, bf16 for ort:cuda (graphs for ort:cuda need a GPU, and this comparison runs on the CPU)."
        in shown.getvalue()
    )
    assert "held against torch in fp32 over" in shown.getvalue()
    for precision in ("fp16", "bf16"):
        read = [matrices(mixed.out / f"graphs/router.{target}.{precision}.onnx") for target in ("ort-cpu", "ort-cuda")]
        assert read[0] == read[1] and len(read[0]) > 4
        with FusionRuntime.load(mixed.out, precision, threads=1) as runtime:
            assert np.isfinite(runtime.score([5, 9, 200]).logits).all()


def matrices(file: Path) -> set[StoredWeight]:
    """Where the matrices lie that a graph reads."""
    shapes = {name: value.shape for name, value in ir.load(file).graph.initializers.items()}
    return {weight for name, weight in stored_weights(file).items() if len(shapes[name]) == 2 and "rotary" not in name}


def test_strict_refuses_what_could_not_be_compared(mixed: Request) -> None:
    for targets in (mixed.targets, ("ort:cuda",)):
        with pytest.raises(
            FusionError, match=r"^The precision fp16 for ort:cuda could not be compared with torch \(.*need a GPU.*\); .*--strict\.$"
        ):
            export(replace(mixed, targets=targets, precisions=("fp16",), out=mixed.out.with_name("strict"), strict=True), quiet())
        assert not mixed.out.with_name("strict").exists()


def test_a_bundle_for_gpus_only_is_refused_on_a_cpu(mixed: Request) -> None:
    out = mixed.out.with_name("gpu")
    report = export(replace(mixed, targets=("ort:cuda",), precisions=("bf16",), out=out), quiet())
    assert "reference in torch" not in [stage["name"] for stage in report["stages"]]
    for device in ("auto", "cpu"):
        with pytest.raises(
            UnavailableError, match=r"^The bundle .* has no graphs for ort:cpu, only for ort:cuda: export it with --target ort:cpu\.$"
        ):
            FusionRuntime.load(out, device=device)


def quiet() -> Stages:
    return Stages(Console(quiet=True))


def test_default_precisions_are_those_that_the_targets_have() -> None:
    for family, half in (("gemma2", "bf16"), ("llama3", "fp16")):
        chosen = FAMILIES[family]
        assert parse_precisions(None, parse_targets("ort:cuda"), chosen) == (half,)
        assert parse_precisions(None, parse_targets("ort"), chosen) == ("fp32", "int8")
        assert parse_precisions(None, parse_targets("ort,ort:cuda"), chosen) == ("fp32", "int8", half)


def test_rtx_means_the_graphs_of_tensorrt_and_engines_for_some_gpus() -> None:
    assert parse_targets("ort,rtx:sm86+sm89,tensorrt") == ("ort:cpu", "tensorrt")
    assert parse_gpus("ort,rtx:sm86+sm89,rtx:sm120") == (86, 89, 120) == parse_gpus("rtx")
    assert parse_gpus("ort,tensorrt") == ()
    for family, half in (("gemma2", "bf16"), ("llama3", "fp16")):
        assert parse_precisions(None, parse_targets("rtx"), FAMILIES[family]) == (half, "int8")


def test_named_precisions_must_serve_every_target() -> None:
    family, both = FAMILIES["llama3"], parse_targets("ort,ort:cuda")
    assert parse_precisions("int8, fp16", both, family) == ("int8", "fp16")
    with pytest.raises(
        typer.BadParameter, match=r"^ort:cuda has no precision fp32 or int8; name one of fp16, bf16 too, or leave the target out$"
    ):
        parse_precisions("fp32,int8", both, family)
    with pytest.raises(typer.BadParameter, match=r"^unknown precision 'int8' for ort:cuda; expected fp16, bf16$"):
        parse_precisions("int8", parse_targets("ort:cuda"), family)
