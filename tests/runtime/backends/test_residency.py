"""Experts that do not all fit a budget: the same tokens, never more of them in memory, and a runtime that survives failures."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.runtime import BundleError, ClosedError, FusionError, FusionRuntime, InputError
from fusionroute.runtime.backends import ort_cpu
from fusionroute.runtime.backends.residency import OpenedModel, Residency
from fusionroute.runtime.bundle import Bundle
from tests.support.in_threads import generated_together

PRECISIONS = ("fp32", "int8", "int4")
PROMPTS = [[number, 5, 9, 40 + number] for number in range(3, 11)]


def stored(bundle: Path, precision: str) -> int:
    """Bytes of the largest expert."""
    opened = Bundle.open(bundle)
    graphs = opened.variant("ort:cpu", precision).graphs
    return max(opened.stored_bytes(graphs[name]) for name in opened.manifest.experts)


def load(bundle: Path, precision: str, experts: float | None, **options: Any) -> FusionRuntime:
    """With room for so many experts; None: without a budget."""
    budget = None if experts is None else int(experts * stored(bundle, precision))
    return FusionRuntime.load(bundle, precision, "cpu", threads=1, expert_memory=budget, **options)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The experts that were opened, by their numbers, in order."""
    numbers: list[int] = []
    init = Residency.__init__

    def noted(self: Residency, budget: int, sizes: Any, open_expert: Callable[[int], OpenedModel]) -> None:
        def opening(expert: int) -> OpenedModel:
            numbers.append(expert)
            assert sum(sizes[each] for each in {*self._resident, expert}) <= budget
            return open_expert(expert)

        init(self, budget, sizes, opening)

    monkeypatch.setattr(Residency, "__init__", noted)
    return numbers


Program = list[tuple[str, Any]]
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(5, 90), min_size=1, max_size=40)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("sample"), st.integers(0, 99)),
    st.tuples(st.just("rewind"), st.floats(0, 1)),
    st.tuples(st.just("other session"), st.none()),
    st.tuples(st.just("expert"), st.integers(0, 2)),
)


def play(rt: FusionRuntime, program: Program) -> list[Any]:
    """Two sessions, one of which a program uses at a time, and a third of one expert; every token with all that it says."""
    sessions = [rt.session(), rt.session()]
    for session in sessions:
        session.append([3, 4, 5])
    tokens: list[Any] = []
    for what, value in program:
        session = sessions[0]
        if what == "append":
            session.append(value)
        elif what == "step":
            tokens += [session.step() for _ in range(value)]
        elif what == "sample":
            tokens.append(session.step(temperature=1.2, seed=value))
        elif what == "rewind":
            session.rewind(1 + int(value * (len(session) - 1)))
        elif what == "other session":
            sessions.reverse()
        else:
            tokens += list(rt.stream(session.token_ids, 2, expert=rt.expert_names[value], ignore_eos=True))
    return [(token.id, token.expert, token.logprob, token.routing.tolist()) for token in tokens]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_random_programs_give_what_they_give_without_a_budget(merged: Path, precision: str, opened: list[int]) -> None:
    """To the last bit, with room for one expert, for two, and for all."""
    with load(merged, precision, None) as reference, load(merged, precision, 1) as one, load(merged, precision, 2.9) as two:

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(st.lists(OPERATIONS, min_size=1, max_size=12))
        def check(program: Program) -> None:
            expected = play(reference, program)
            for rt in (one, two):
                assert play(rt, program) == expected

        check()
        evictions = len(opened) - 5  # one takes an expert that nobody leaves for, two takes two
        assert evictions > 10
    opened.clear()
    with load(merged, precision, None) as reference, load(merged, precision, 3) as three:
        program = [("expert", number) for number in (0, 1, 2, 1, 0)] + [("step", 9)]
        assert play(three, program) == play(reference, program)
        assert sorted(opened) == [0, 1, 2]


def test_experts_are_opened_when_they_are_chosen_and_the_least_recently_used_leaves(merged: Path, opened: list[int]) -> None:
    with load(merged, "int8", 2) as rt:
        assert opened == []
        session = rt.session()
        session.append([3, 4])
        for expert in (0, 1, 0, 2, 0, 1):
            session._decoder.readers.read_expert(expert, [len(session) - 1])
        assert opened == [0, 1, 2, 1]  # expert 1 left for 2, and 2 for 1: 0 was used more recently both times


def test_scores_and_speculation_within_a_budget(merged: Path, opened: list[int]) -> None:
    ids = [int(word) for word in np.random.default_rng(0).integers(5, 90, 60)]
    for options in ({}, {"exact": True}, {"speculation": "auto"}):
        with load(merged, "int8", None, **options) as reference, load(merged, "int8", 1, **options) as rt:
            expected, scores = reference.score(ids, chunk=1), rt.score(ids, chunk=1)
            assert np.array_equal(scores.logits, expected.logits) and np.array_equal(scores.experts, expected.experts)
            if options != {"speculation": "auto"}:  # whose rounds hang on what passes cost
                assert rt.generate(ids, 20).token_ids == reference.generate(ids, 20).token_ids
    assert len(opened) > 6


def test_threads_wait_for_each_others_passes(merged: Path, opened: list[int]) -> None:
    with load(merged, "int8", None) as reference:
        expected = [reference.generate(prompt, 6).token_ids for prompt in PROMPTS]
    for experts in (1, 2):
        with load(merged, "int8", experts) as rt:
            assert generated_together(rt, PROMPTS, 6) == expected


def test_shared_weights_are_mapped_anew(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[-1] for line in lines if str(tmp_path) in line and line.endswith("weights.bin")})

    with load(merged, "int8", None) as reference, load(merged, "int8", 1, share_weights=True) as rt:
        for name in rt.expert_names:
            assert rt.generate(PROMPTS[0], 5, expert=name).token_ids == reference.generate(PROMPTS[0], 5, expert=name).token_ids
            assert mapped() == 2  # the router and one expert


@contextmanager
def failing(rt: FusionRuntime, expert: int, error: Exception) -> Iterator[None]:
    """While the body runs, an expert cannot be opened."""
    residency = rt.backend.experts[0].lease.func.__self__  # type: ignore[attr-defined]
    open_expert = residency._open_expert

    def opening(number: int) -> OpenedModel:
        if number == expert:
            raise error
        opened: OpenedModel = open_expert(number)
        return opened

    residency._open_expert = opening
    try:
        yield
    finally:
        residency._open_expert = open_expert


def test_an_expert_that_cannot_be_opened_leaves_the_runtime_usable(merged: Path) -> None:
    with load(merged, "int8", None) as reference, load(merged, "int8", 1) as rt:
        expected = {name: reference.generate(PROMPTS[0], 5, expert=name).token_ids for name in rt.expert_names}
        first, second = rt.expert_names[:2]
        session = rt.session(expert=second)
        session.append(PROMPTS[0])
        for error in (BundleError("The weights are gone."), MemoryError()):
            with failing(rt, 1, error):
                for _ in range(2):
                    with pytest.raises(type(error)):
                        session.step()
                assert session.token_ids == PROMPTS[0]
                assert rt.generate(PROMPTS[0], 5, expert=first).token_ids == expected[first]
        assert [session.step().id for _ in range(5)] == expected[second]


def test_the_router_answers_for_an_expert_that_cannot_be_opened(merged: Path) -> None:
    with load(merged, "int8", 1, on_expert_failure="router_only") as rt, failing(rt, 1, BundleError("The weights are gone.")):
        tokens = list(rt.stream(PROMPTS[0], 4, expert=rt.expert_names[1], ignore_eos=True))
        assert {token.expert for token in tokens} == {"router"}


def test_weights_that_are_gone_are_named(merged: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged, tmp_path / "bundle"))
    with load(copy, "int8", 1) as rt:
        graph = Bundle.open(copy).variant("ort:cpu", "int8").graphs[rt.expert_names[2]]
        (copy / graph).unlink()
        with pytest.raises(BundleError, match=graph):
            rt.generate(PROMPTS[0], 3, expert=rt.expert_names[2])
        assert len(rt.generate(PROMPTS[0], 3, expert=rt.expert_names[1], ignore_eos=True).token_ids) == 3


def test_closing_frees_the_experts(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    init = OpenedModel.__init__

    def noted(self: OpenedModel, session: Any) -> None:
        alive.add(session)
        init(self, session)

    monkeypatch.setattr(OpenedModel, "__init__", noted)
    rt = load(merged, "int8", 2)
    session = rt.session()
    session.append(PROMPTS[0])
    session.step()
    for name in rt.expert_names:
        rt.generate(PROMPTS[0], 2, expert=name)
    gc.collect()
    assert len(alive) == 3  # the router and two experts
    rt.close()
    with pytest.raises(ClosedError):
        session.step()
    del session
    gc.collect()
    assert not alive


def test_budgets_that_hold_no_expert_are_refused(merged: Path, shared: Path) -> None:
    size = stored(merged, "int8")
    with pytest.raises(InputError) as caught:
        FusionRuntime.load(merged, "int8", "cpu", expert_memory=size - 1)
    assert str(caught.value) == f"expert_memory={size - 1} does not hold the {size} bytes of one expert: allow at least as much, or none."
    with pytest.raises(InputError, match="expert_memory is for experts that can leave"):
        FusionRuntime.load(shared, "int8", "cpu", expert_memory=1 << 40)


def test_packed_weights_are_measured_on_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small ones a session's own memory would be measured."""
    amounts = iter([5000, 5000 + 3 * (1 << 29), 5000, 9000, 5000, 4000])
    monkeypatch.setattr(ort_cpu, "taken", lambda: next(amounts))
    model = OpenedModel(None)
    assert ort_cpu.growing(lambda: model, 1 << 30) == (model, 1.5)
    assert ort_cpu.growing(lambda: model, 1000) == (model, 1.0)
    assert ort_cpu.growing(lambda: model, 1 << 30) == (model, 1.0), "others freed memory meanwhile"


class Opening:
    """Experts that are opened when the test lets them be."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.go = threading.Event()

    def __call__(self, expert: int) -> OpenedModel:
        self.begun.append(expert)
        assert self.go.wait(60)
        if expert == 3:
            raise FusionError("It is broken.")
        return OpenedModel(expert)


def used(residency: Residency, expert: int) -> Any:
    with residency.leases[expert]() as opened:
        return opened.session


def test_an_expected_expert_is_opened_beside_other_work() -> None:
    opening = Opening()
    residency = Residency(20, [10] * 4, opening)
    opening.go.set()
    assert [used(residency, expert) for expert in (0, 1)] == [0, 1]
    opening.go.clear()
    residency.expect(2)  # returns at once, and lets 0 leave: 1 was used last
    residency.expect(3)  # one at a time
    assert used(residency, 1) == 1, "the other one answers meanwhile"
    opening.go.set()
    assert used(residency, 2) == 2
    assert opening.begun == [0, 1, 2]
    residency.expect(2)
    residency.expect(1)
    assert opening.begun == [0, 1, 2], "they are there"
    residency.expect(3)  # fails, and says nothing until it is chosen
    with pytest.raises(FusionError, match="It is broken"):
        used(residency, 3)
    assert used(residency, 1) == 1 or opening.begun[-1] == 1


def test_a_guess_lets_neither_the_latest_expert_leave_nor_one_that_runs() -> None:
    opening = Opening()
    opening.go.set()
    tight = Residency(10, [10] * 3, opening)
    tight.expect(0)
    assert used(tight, 0) == 0
    tight.expect(1)
    assert opening.begun == [0]
    wide = Residency(20, [10] * 3, opening)
    with wide.leases[0]():
        assert used(wide, 1) == 1
        wide.expect(2)
        assert opening.begun == [0, 0, 1]


def test_a_pass_waits_until_others_let_go() -> None:
    opening = Opening()
    opening.go.set()
    residency = Residency(25, [10, 20, 5], opening)
    order: list[str] = []
    with residency.leases[0]() as opened:
        waiting = threading.Thread(target=lambda: order.append(f"used {used(residency, 1)}"))
        waiting.start()
        assert used(residency, 2) == 2, "what fits need not wait"
        waiting.join(0.05)
        assert not order and opened.session == 0
        order.append("let go")
    waiting.join(60)
    assert order == ["let go", "used 1"]
    assert opened.session is None, "it was closed"


def test_the_step_tells_whom_it_expects(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert that answered behind the same token before; one that is named, at once; nobody where no expert has a say."""
    with load(merged, "int8", 2) as rt:
        expected: list[int] = []
        monkeypatch.setattr(rt.backend, "expect", expected.append)
        session = rt.session()
        session.append([7, 8])
        first = rt.expert_names.index(session.step().expert)
        assert expected == []
        session.append([8])
        session.step()
        assert expected == [first]
        named = rt.session(expert=rt.expert_names[2])
        named.append([7, 8])
        named.step()
        assert expected == [first, 2]
        named.step(lam=1.0)
        assert expected == [first, 2]
