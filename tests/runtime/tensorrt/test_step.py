"""What one decoded token costs: one wait of the host, no allocation, captured graphs; and what guesses do."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.backend import FusionInputs
from fusionroute.runtime.plain_step import PlainStep
from fusionroute.runtime.session import Session
from tests.runtime.tensorrt.scenarios import PROMPT
from tests.support.simulated.bundles import CHUNK
from tests.support.simulated.cuda import Cuda
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine

Running = tuple[FusionRuntime, Machine, Cuda]


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    machine = Machine(0, "late")
    with patch("fusionroute.runtime.limits.CHUNK", CHUNK), simulated(machine) as cuda, FusionRuntime.load(folder, device="rtx") as rt:
        yield rt, machine, cuda


def steps(rt: FusionRuntime, count: int, **options: Any) -> Iterator[tuple[bool, Session]]:
    """Whether each step's guess was right, with no token lagging behind."""
    session = rt.session()
    session.append(PROMPT)
    for expert in range(len(rt.expert_names)):
        session._decoder.readers.read_expert(expert, [len(session) - 1])
    for _ in range(count):
        guess = session._decoder.step.guess_expert()
        token = session.step(**options)
        yield guess is not None and rt.expert_names[guess] == token.expert, session


def test_the_host_waits_once_for_a_token_whose_expert_was_guessed(running: Running) -> None:
    rt, machine, _ = running
    seen = {True: set(), False: set()}  # type: dict[bool, set[int]]
    before = None
    for right, session in steps(rt, 60):
        waits = sum(count for site, count in machine.sites.items() if site.startswith("host waits"))
        if before is not None:
            caught_up = all(lag <= CHUNK for lag in session.lags.values())
            if right or caught_up:
                seen[right].add(waits - before)
        before = waits
    assert seen[True] == {1}
    assert min(seen[False]) == 2, "routing, then the right expert's logits"


def test_nothing_is_allocated_for_a_token_after_warm_up(running: Running) -> None:
    rt, machine, cuda = running
    options: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_k": 5, "seed": 0}]
    for option in options:
        warm = []
        for number, _ in enumerate(steps(rt, 100, **option)):
            warm.append((number, machine.heap.count, len(cuda.events), len(cuda.streams), len(cuda.graphs), cuda.launches))
        settled = warm[40:]
        assert {entry[1:5] for entry in settled} == {settled[0][1:5]}
        assert settled[-1][5] - settled[0][5] >= 3 * (len(settled) - 1), "all of router, expert and fusion are graphs by now"


def test_a_fusion_lacks_other_attributes_as_any_object_does(running: Running) -> None:
    rt, _, _ = running
    router, expert = (model.cache().forward(PROMPT[:2], [1]) for model in (rt.backend.router, rt.backend.experts[0]))
    fused = rt.backend.fuser()(FusionInputs(router.logits, expert.logits, (0.5, 0.5)))
    assert not hasattr(fused, "candidate_ids") and not hasattr(fused, "__deepcopy__")
    with pytest.raises(AttributeError, match=r"no 'id': expected one of ids, "):
        _ = fused.id  # type: ignore[attr-defined]
    assert np.array_equal(copy.copy(fused).ids, fused.ids)


def test_router_and_guessed_expert_run_side_by_side(running: Running) -> None:
    rt, machine, _ = running
    overlaps = {True: 0, False: 0}
    counts = {True: 0, False: 0}
    for right, _ in steps(rt, 40):
        runs = [span for span in machine.timeline if span.name.startswith("run of") and "fusion" not in span.name]
        router = next(span for span in reversed(runs) if "router" in span.name)
        counts[right] += 1
        overlaps[right] += any(s.stream != router.stream and s.start < router.end and router.start < s.end for s in runs)
    assert overlaps[True] == counts[True] > 3
    assert counts[False] > 3


def test_a_wrong_guess_leaves_nothing_behind(running: Running) -> None:
    """What each expert has read after every step is what it would have read without guesses."""
    rt, _, _ = running
    lags = [(right, session.lags) for right, session in steps(rt, 40)]
    with patch.object(PlainStep, "guess_expert", lambda step: None):
        assert [lag for _, lag in lags] == [session.lags for _, session in steps(rt, 40)]
    assert {right for right, _ in lags} == {True, False}


def test_only_an_active_expert_is_guessed(running: Running) -> None:
    rt, _, _ = running
    session = rt.session()
    session.append(PROMPT)
    assert session._decoder.step.guess_expert() is None, "none was chosen yet"
    token = session.step()
    assert session._decoder.step.guess_expert() == rt.expert_names.index(token.expert)
    session.append([3, 4])
    assert session._decoder.step.guess_expert() is None, "it lags by more than one token"
    session.step()
    session.rewind(0)
    session.append([5])
    assert session._decoder.step.guess_expert() is None, "a new text"
