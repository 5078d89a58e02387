"""Costs of passes are measured once; with `exact`, a plain step costs two tokens."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import Output
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


class Timed:
    """A model that notes the passes that are timed: (tokens before, tokens)."""

    def __init__(self) -> None:
        self.passes: set[tuple[int, int]] = set()
        self.length = 0

    def cache(self) -> "Timed":
        return self

    def forward(self, ids: list[int], positions: Any) -> Output:
        self.passes.add((self.length, len(ids)))
        return Output(np.zeros((len(positions), 4), np.float32), None)


@pytest.mark.parametrize(("capacity", "lengths"), [(4096, [32, 1024]), (200, [32, 192]), (20, [12, 12]), (8, [0, 0])])
def test_passes_are_timed_behind_texts_that_fit_the_context(capacity: int, lengths: list[int]) -> None:
    router, expert = Timed(), Timed()
    models = [SimpleNamespace(parameters=number) for number in (1, 2, 2)]
    bundle = SimpleNamespace(manifest=SimpleNamespace(models=models, max_seq_len=capacity))
    fused = SimpleNamespace(ids=None)
    backend = SimpleNamespace(
        router=router, experts=[expert, Timed()], apart=frozenset(), async_dispatch=False, forward_both=None, fuser=lambda: lambda _: fused
    )
    measured = costs.measure(bundle, backend)  # type: ignore[arg-type]
    expected = {(length, size) for length in lengths for size in costs.SIZES} | {(0, 1)}  # the last one is fused
    assert router.passes == expert.passes == expected
    assert not backend.experts[1].passes and measured.experts[0] == measured.experts[1], "equal experts are timed once"
