"""Programs of a session at random, against a plain model: a list of tokens, each of which scoring that list explains."""

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from fusionroute.runtime import FusionRuntime, InputError, NumericalError, Token
from tests.support.speculation import draft_always

TOKENS = st.lists(st.integers(5, 90), min_size=1, max_size=24)
SAMPLING = st.sampled_from([{}, {"temperature": 1.0, "top_k": 1}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.0}])
TIE = 1e-3  # logits, and routing scores, this close may change places: passes of other lengths round differently
LONGEST = 160  # tokens of a text that grows
MODES: dict[str, dict[str, Any]] = {
    "lazy": {},
    "background": {"catch_up": "background"},
    "drafts": {"speculation": "auto"},
    "exact": {"speculation": "auto", "exact": True, "catch_up": "background"},
}


class Machine(RuleBasedStateMachine):
    """One session, others that share its runtime's prefix cache, and what tokens it must hold."""

    runtime: FusionRuntime
    reference: FusionRuntime  # without drafts and a prefix cache
    file: Path  # where texts are saved
    begun = 0  # programs

    @initialize()
    def begin(self) -> None:
        type(self).begun += 1
        self.session = self.runtime.session()
        self.ids: list[int] = []

    def teardown(self) -> None:
        self.session.clear()

    @precondition(lambda self: len(self.ids) < LONGEST)
    @rule(new=TOKENS)
    def append(self, new: list[int]) -> None:
        self.session.append(new)
        self.ids += new

    @rule(share=st.floats(0, 1))
    def rewind(self, share: float) -> None:
        length = round(share * len(self.ids))
        self.session.rewind(length)
        del self.ids[length:]

    @precondition(lambda self: len(self.ids) < LONGEST)
    @rule(back=st.integers(0, 3), new=TOKENS)
    def rewind_a_little(self, back: int, new: list[int]) -> None:
        """And go on with other tokens: what was read of the old ones must not answer."""
        length = max(len(self.ids) - back, 0)
        self.session.rewind(length)
        self.ids[length:] = new
        self.session.append(new)
        self.explain([self.session.step()], False)

    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.ids.clear()

    @rule(beyond=st.integers(1, 5))
    def rewind_too_far(self, beyond: int) -> None:
        with pytest.raises(InputError, match="Cannot rewind"):
            self.session.rewind(len(self.ids) + beyond)

    @rule(new=st.lists(st.sampled_from([-1, 10**6, True, 5.5, None]), min_size=1, max_size=2), good=TOKENS)
    def append_wrong(self, new: list[Any], good: list[int]) -> None:
        with pytest.raises(InputError):
            self.session.append([*good, *new])

    @precondition(lambda self: 0 < len(self.ids) < LONGEST)
    @rule(sampling=SAMPLING)
    def step(self, sampling: dict[str, Any]) -> None:
        self.explain([self.session.step(**sampling)], sampling.get("temperature", 0.0) and "top_k" not in sampling)

    @precondition(lambda self: 0 < len(self.ids) < LONGEST)
    @rule(most=st.integers(1, 9))
    def steps(self, most: int) -> None:
        """A round of drafts gives as many as hold, which hangs on rounds before; together always as many, as programs need."""
        tokens: list[Token] = []
        while len(tokens) < most:
            tokens += self.session.steps(most - len(tokens))
        assert len(tokens) == most
        self.explain(tokens, False)

    def explain(self, tokens: list[Token], drawn: bool) -> None:
        """Each token is the likeliest (if it was not drawn) by the scores of all before it, of an expert that they choose."""
        start = len(self.ids)
        self.ids += [token.id for token in tokens]
        scores = self.reference.score(self.ids[:-1], positions=range(start - 1, len(self.ids) - 1))
        for token, row, routing in zip(tokens, scores.logits.astype(np.float64), scores.routing, strict=True):
            number = self.runtime.expert_names.index(token.expert)
            tied = np.count_nonzero(routing >= routing.max() - TIE) > 1
            assert routing[number] >= routing.max() - TIE
            if not tied:
                assert drawn or row[token.id] >= row.max() - TIE
                assert token.logprob == pytest.approx(row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum()), abs=TIE)

    @rule(experts=st.sets(st.integers(0, 1)))
    def read(self, experts: set[int]) -> None:
        """Nothing else is seen of it: the next steps are what they would have been."""
        self.session.read([self.runtime.expert_names[number] for number in experts])

    @rule(into=st.sampled_from(["itself", "another", "another after it was closed"]))
    def save_and_load(self, into: str) -> None:
        """The text goes on in another session, with the lags that models had."""
        lags = self.session.lags
        self.session.save(self.file)
        if into != "itself":
            closed = self.session
            self.session = self.runtime.session()
            if into == "another":
                self.session.append([7, 8])
            else:
                closed.close()
        self.session.load(self.file)
        assert self.session.lags == lags

    @precondition(lambda self: len(self.ids) > 1)
    @rule(new=TOKENS, how=st.sampled_from(["generate", "cancelled", "late", "dropped", "never begun"]))
    def another_text(self, new: list[int], how: str) -> None:
        """It begins as this one does, borrows what was read and takes the place of what is kept. This one stays as it is."""
        prompt = [*self.ids[: len(self.ids) // 2], *new]
        cancel = Event()
        if how == "cancelled":
            cancel.set()
        stream = self.runtime.stream(prompt, 3, cancel=cancel, deadline=0.0 if how == "late" else None)
        if how == "dropped":
            next(stream, None)
        elif how != "never begun":
            assert len(list(stream)) == (3 if how == "generate" else 0) or stream.finish_reason == "stop"

    @precondition(lambda self: 0 < len(self.ids) < LONGEST)
    @rule()
    def nan_in_what_was_read(self) -> None:
        """One step fails, and the next one is what it would have been."""
        router = self.session._decoder.readers.router
        if min(router.length, (len(self.ids) - 1) // 2 * 2) < 2:  # exact passes are even: they may read all of a short text again
            return
        cache: Any = getattr(router.cache, "cache", router.cache)
        cache.memory.buffers[...] = np.nan
        with pytest.raises(NumericalError, match="of router in fp32 hold NaN or infinity"):
            self.session.step()
        assert self.session.token_ids == self.ids
        self.explain([self.session.step()], False)

    @precondition(lambda self: 0 < len(self.ids) < LONGEST)
    @rule()
    def from_another_thread(self) -> None:
        """Threads may take turns."""
        tokens: list[Token] = []
        worker = Thread(target=lambda: tokens.append(self.session.step()))
        worker.start()
        worker.join()
        self.explain(tokens, False)

    @invariant()
    def holds_its_tokens(self) -> None:
        if hasattr(self, "session"):
            assert self.session.token_ids == self.ids and len(self.session) == len(self.ids)
            assert all(0 <= lag <= len(self.ids) for lag in self.session.lags.values())


@pytest.mark.parametrize("number", [0, 2], ids=["models", "one base"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("programs", "rules"), [(8, 20), pytest.param(1300, 40, marks=pytest.mark.slow)])
def test_every_program_leaves_a_text_that_scoring_explains(
    bundles: list[Path], mode: str, number: int, programs: int, rules: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_always(monkeypatch)
    options: Callable[..., FusionRuntime] = FusionRuntime.load
    with (
        options(bundles[number], "fp32", "cpu", threads=1, prefix_cache=2, **MODES[mode]) as runtime,
        options(bundles[number], "fp32", "cpu", threads=1, prefix_cache=0) as reference,
    ):
        machine: Any = type("Program", (Machine,), {"runtime": runtime, "reference": reference, "file": tmp_path / "text"})
        checks = settings(
            max_examples=programs, stateful_step_count=rules, deadline=None, derandomize=programs < 100, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        run_state_machine_as_test(machine, settings=checks)
        assert machine.begun >= programs
