"""Costs of passes are measured once; with `exact`, a plain step costs two tokens."""

from dataclasses import asdict
from pathlib import Path

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.cache import write_checked
from fusionroute.runtime.speculation import costs
from fusionroute.runtime.speculation.costs import VALID, Costs, read_costs, seconds_by_tokens
from tests.support.speculation import ONE


def test_without_reading_alone_a_plain_step_costs_two_tokens() -> None:
    assert seconds_by_tokens(ONE, 0, exact=True)[1] == seconds_by_tokens(ONE, 0)[2] == 1.1


def test_costs_are_measured_once(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as first:
        assert (
            first._sets.current.costs is not None
            and first._sets.current.costs.fusion > 0
            and len(first._sets.current.costs.experts) == len(first.expert_names)
        )
        for passes in (first._sets.current.costs.router, *first._sets.current.costs.experts):
            assert len(passes) == 2 and all(seconds > 0 for length in passes for seconds in length)
        monkeypatch.setattr(costs, "measure", None)
        with FusionRuntime.load(bundles[0], device="cpu", precision="fp32", speculation="auto") as second:
            assert second._sets.current.costs == first._sets.current.costs


def test_passes_of_both_are_measured_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FusionRuntime.load(shared, "fp32", "cpu", speculation="auto") as first:
        assert first._sets.current.costs is not None and first._sets.current.costs.joint is not None
        assert all(seconds > 0 for passes in first._sets.current.costs.joint for length in passes for seconds in length)
        monkeypatch.setattr(costs, "measure", None)
        with FusionRuntime.load(shared, "fp32", "cpu", speculation="auto") as second:
            assert second._sets.current.costs == first._sets.current.costs


def test_costs_of_a_month_ago_and_of_other_experts_are_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    known = Costs(ONE, (ONE, ONE), 0.5, True, (ONE, ONE))
    write_checked(file, asdict(known) | {"measured": 1000.0})
    for seconds, expected in ((0.0, known), (VALID, known), (VALID + 1, None)):
        assert read_costs(file, 2, lambda seconds=seconds: 1000.0 + seconds) == expected  # type: ignore[misc]
    assert read_costs(file, 1, lambda: 1000.0) is None and read_costs(tmp_path / "none.json", 2) is None
