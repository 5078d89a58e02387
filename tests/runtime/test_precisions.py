"""Which precision of a bundle is opened by default, and that none is without a bound."""

import json
import shutil
from pathlib import Path

import pytest

from fusionroute.runtime import FusionError, FusionRuntime
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.precisions import PRECISIONS, Bounds, Precision, fastest_first

# Tokens per second of one router and one expert on two cores with AVX-512 VNNI, and without: docs/performance.md,
# docs/embedding.md.
MEASURED = ({"fp32": 15.3, "int8": 31.7, "int4": 38.8}, {"fp32": 12.8, "int8": 25.5, "int4": 36.7})


@pytest.mark.parametrize("speeds", MEASURED)
def test_the_order_is_that_of_the_measured_speeds(speeds: dict[str, float]) -> None:
    assert fastest_first(speeds, "ort:cpu") == sorted(speeds, key=lambda name: -speeds[name])


ORDERS = {
    # ONNX Runtime widens half precision on a CPU and computes Q/DQ products there in fp32
    "ort:cpu": ["int4", "int8", "fp32", "fp16", "bf16", "w8a8"],
    "ort:cuda": ["fp16", "bf16"],
    "tensorrt": ["int4", "nvfp4", "int8", "fp8", "int8-wo", "fp16", "bf16", "fp32"],
    "tensorrt:10.3": ["int8", "int8-wo", "fp16", "bf16", "fp32"],
}


@pytest.mark.parametrize("target", ORDERS)
def test_every_precision_of_a_target_has_its_place(target: str) -> None:
    assert fastest_first(sorted(ORDERS[target]), target) == ORDERS[target]
    assert fastest_first(["fp3", *ORDERS[target]], target) == [*ORDERS[target], "fp3"], "a newer exporter's comes last"


@pytest.mark.parametrize("other", ["int4", "int8"])
def test_the_fastest_precision_is_opened_where_none_is_named(bundles: list[Path], tmp_path: Path, other: str) -> None:
    """A bundle of fp32 and int4 opened fp32."""
    folder = Path(shutil.copytree(bundles[0], tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [variant["precision"] for variant in manifest["variants"]] == ["fp32", "int8"]
    manifest["variants"][1]["precision"] = other
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with FusionRuntime.load(folder, device="cpu") as runtime:
        assert runtime.precision == other
    assert Bundle.open(folder).variant("ort:cpu", None).precision == other
    assert Bundle.open(folder).variant("ort:cpu", "fp32").precision == "fp32"


def test_a_precision_without_a_bound_is_refused_when_its_record_is_made() -> None:
    cases: list[tuple[Bounds, dict[str, Bounds]]] = [({}, {}), ({"kl_mean": 1.0}, {"tensorrt": {}})]
    for bounds, bounds_on in cases:
        with pytest.raises(FusionError, match=r"^The precision 'fp8' has no bound: give its record in runtime/precisions\.py .*\.$"):
            Precision("fp8", 8, bounds, "8-bit floats", ("tensorrt",), bounds_on=bounds_on)
    assert PRECISIONS["int8"].bounds_for("tensorrt:10.3") == PRECISIONS["w8a8"].bounds_for("tensorrt")
    assert PRECISIONS["int8"].bounds_for("ort:cpu")["kl_mean"] == 0.01
