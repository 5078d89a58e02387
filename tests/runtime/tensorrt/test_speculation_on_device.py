"""Speculation on a device: the tokens are those of plain decoding."""

from pathlib import Path
from unittest.mock import patch

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.speculation.draft_planner import DraftPlan, DraftPlanner
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine
from tests.support.speculation import EVEN


def plan(self: DraftPlanner, most: int, looked_up: int, *_: object) -> DraftPlan:
    """As many drafts as these engines read at a time, from the text where it offers some."""
    return DraftPlan("lookup", min(looked_up + 1, most, CHUNK)) if looked_up else DraftPlan("router", min(most, CHUNK))


def test_drafts_change_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftPlanner, "plan", plan)
    monkeypatch.setattr("fusionroute.runtime.speculation.costs.costs_of", lambda *_: EVEN)  # clocks mean nothing there
    results = []
    for speculation in ("off", "auto"):
        with (
            patch("fusionroute.runtime.limits.CHUNK", CHUNK),
            simulated(Machine(0, "late")),
            FusionRuntime.load(folder, device="rtx", speculation=speculation) as rt,
        ):
            texts = [rt.generate(ids, 12) for ids in ([3, 4, 5, 3, 4], [7, 1], [2] * 9)]
            results.append([(text.token_ids, text.experts) for text in texts])
    assert results[0] == results[1]
    assert sum(text.drafted for text in texts) > 20
