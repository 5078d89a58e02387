"""How near the estimate is to published measurements, and that the fit finds what it is made for."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.plan_errors import summary
from fusionroute.runtime.plan.data_files import read
from fusionroute.runtime.plan.devices import devices
from fusionroute.runtime.plan.efficiency import Efficiency, fitted, left_out_errors
from fusionroute.runtime.plan.fits import fit_of
from fusionroute.runtime.plan.measurements import measurements
from fusionroute.runtime.plan.processors import Processor
from fusionroute.runtime.plan.shapes import shapes


def test_devices_left_out_of_the_fit_are_estimated_within_15_percent_in_the_median_and_35_at_worst() -> None:
    counted = [row for row in measurements() if row.sure]
    errors = left_out_errors(counted)
    result = summary(counted, errors, [row for row in measurements() if not row.sure])
    assert len(counted) >= 40 and len({row.device for row in counted}) >= 12
    assert {row.precision for row in counted} == {"int4", "nvfp4", "int8", "fp16"}
    assert result["median"] == pytest.approx(np.median(np.abs(errors))) and result["median"] <= 0.15
    assert result["worst"] <= 0.35


def test_only_rows_whose_bytes_are_not_known_are_left_out() -> None:
    rows = read("measurements")["rows"]
    formats = {row["format"] for row, each in zip(rows, measurements(), strict=True) if not each.sure}
    assert formats == {"mlc-int4"}  # its source does not say which of two ways the head is stored
    assert all(each.bytes[1] / each.bytes[0] > 1.25 for each in measurements() if not each.sure)


def test_the_bytes_of_a_published_row_are_those_counted_by_hand() -> None:
    row = next(row for row in measurements() if row.model == "Qwen3-8B" and row.device == "agx-orin-64gb")
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    keys = 2 * 36 * 8 * 128 * 2 * 2048
    assert row.read == 36 * layer * 4.125 / 8 + 151936 * 4096 * 2 + keys
    assert row.bandwidth == 204.8e9


@pytest.mark.parametrize(("share", "slope", "per_layer", "launching"), [(0.8, 0.1, 5e-5, 3e-5), (0.95, -0.05, 2e-5, 8e-5)])
def test_a_fit_finds_the_numbers_that_its_rows_were_made_with(share: float, slope: float, per_layer: float, launching: float) -> None:
    true = Efficiency(share, slope, per_layer, launching, 1.0)
    rows = [replace(row, decode=1 / true.seconds(row.work)) for row in measurements()]
    fit = fitted(rows)
    assert (fit.share, fit.slope, fit.per_layer, fit.launching) == pytest.approx((share, slope, per_layer, launching), rel=0.02, abs=2e-3)
    assert fit.spread == pytest.approx(1, abs=1e-3)


def test_one_wrong_row_hardly_moves_a_fit() -> None:
    rows = [row for row in measurements() if row.sure]
    wrong = [replace(rows[0], decode=rows[0].decode * 4), *rows[1:]]
    right = fitted(rows)
    assert fitted(wrong).share == pytest.approx(right.share, rel=0.1)
    assert fitted(wrong).per_layer == pytest.approx(right.per_layer, rel=0.2)


def test_a_processor_is_as_slow_as_the_slower_of_memory_and_arithmetic() -> None:
    """SmolLM2-135M and Llama-3.2-1B's shape in int8, solved by hand for two unknowns: both are bound by arithmetic."""
    small, large = (
        next(row for row in measurements("cpu with VNNI") if row.model == name and row.precision == "int8")
        for name in ("SmolLM2-135M", "Llama-3.2-1B")
    )
    per_value, per_layer = np.linalg.solve(
        [[small.values, small.layers], [large.values, large.layers]], [1 / small.decode, 1 / large.decode]
    )
    fit = fit_of("cpu with VNNI")
    assert isinstance(fit, Processor)
    assert 2 * fit.rates[1] == pytest.approx(1 / per_value, rel=0.1)
    assert fit.per_layer == pytest.approx(per_layer, rel=0.4)
    wide = next(row for row in measurements("cpu with VNNI") if row.precision == "fp32")
    assert fit.seconds(wide.work) == pytest.approx(wide.read / 24e9 + 30 * fit.per_layer)
    assert fit.seconds(small.work._replace(cores=4)) < fit.seconds(small.work)


def test_every_number_has_a_source() -> None:
    tables = read("measurements")
    for row in tables["rows"] + tables["cpu_rows"]:
        source = tables["sources"][row["source"]]
        assert source["url"].startswith(("https://", "docs/")) and len(source["says"]) > 20
    for entry in read("devices")["devices"]:
        assert len(entry["source"]) > 20 and len(entry["reserved_source"]) > 20
    assert all(shape.source.startswith("https://huggingface.co/") for shape in shapes())
    assert {row["device"] for row in tables["rows"]} <= devices().keys()
