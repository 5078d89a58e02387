"""What nobody asks for is not computed, and what is asked for late is what it would have been."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime, Token
from fusionroute.runtime.backends.greedy_fusion import GreedyFused
from fusionroute.runtime.text import Text
from fusionroute.runtime.text_stream import LateTexts, TextStream

PROMPT = [5, 17, 40, 90]


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The temperatures at which rows of logits were summed."""
    temperatures: list[float] = []
    log_sum = GreedyFused._log_sum

    def noted(self: GreedyFused, temperature: float) -> float:
        temperatures.append(temperature)
        return log_sum(self, temperature)

    monkeypatch.setattr(GreedyFused, "_log_sum", noted)
    return temperatures


@pytest.mark.parametrize("lam", [0.5, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("number", [0, 2], ids=["models", "one base"])
def test_log_probabilities_and_texts_that_are_asked_for_late(bundles: list[Path], number: int, lam: float, sums: list[float]) -> None:
    with FusionRuntime.load(bundles[number], "fp32", "cpu", threads=1, prefix_cache=0) as rt:
        at_once, late = rt.session(lam=lam), rt.session(lam=lam)
        for session in (at_once, late):
            session.append(PROMPT)
        expected = [(token.id, token.logprob, token.text, token.routing.tolist()) for token in (at_once.step() for _ in range(12))]
        sums.clear()
        tokens = [late.step() for _ in range(12)]
        assert len(sums) == 11, "each before the next one takes its place"
        late.rewind(2)
        late.step()
        assert [(token.id, token.logprob, token.text, token.routing.tolist()) for token in reversed(tokens)] == expected[::-1]
        scores = rt.score([*PROMPT, *(token.id for token in tokens)], range(3, 15), lam=lam).logits.astype(np.float64)
        for token, row in zip(tokens, scores, strict=True):
            assert token.logprob == pytest.approx(row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum()), abs=1e-4)
            assert token.logprob == token.logprob


def test_nothing_is_computed_for_tokens_that_nobody_holds(bundles: list[Path], sums: list[float]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", threads=1) as rt:
        session = rt.session()
        session.append(PROMPT)
        for _ in range(10):
            session.step()
        assert not sums
        session.step(temperature=0.7, top_k=1, seed=0)
        assert sums == [0.7, 1.0], "what is drawn needs its sum at once"


def test_logits_that_were_handed_over_belong_to_the_caller(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", threads=1, prefix_cache=0) as rt:
        sessions = [rt.session(), rt.session()]
        for session in sessions:
            session.append(PROMPT)
        expected, token = (session.step() for session in sessions)
        row = sessions[1].logits
        assert int(row.argmax()) == token.id and row[token.id] == sessions[0].logits[token.id]
        row[:] = 0
        assert token.logprob == expected.logprob


def test_tokens_are_compared_shown_and_pickled_as_what_they_hold(bundles: list[Path]) -> None:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", threads=1, prefix_cache=0) as rt:
        sessions = [rt.session(), rt.session()]
        for session in sessions:
            session.append(PROMPT)
        token, same = (session.step() for session in sessions)
        copy = pickle.loads(pickle.dumps(token))
        assert token == same == copy and token != sessions[0].step() and token != token.id
        assert np.array_equal(copy.routing, token.routing) and copy.routing.dtype == np.float32
        assert repr(token) == repr(copy) and repr(token).startswith(
            f"Token(id={token.id}, expert={token.expert!r}, logprob={token.logprob}, "
        )
        with pytest.raises(TypeError, match="unhashable"):
            hash(token)


@pytest.fixture(scope="module")
def tokenizer(bundles: list[Path]) -> Text:
    """Of single bytes: many tokens end inside a character."""
    return Text.load(bundles[0] / "tokenizer.json")


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 299), min_size=1, max_size=30), data=st.data())
def test_late_texts_are_those_of_a_stream(tokenizer: Text, ids: list[int], data: st.DataObject) -> None:
    """Asked for in any order: what a token adds to the text that is certain."""
    stream, late = TextStream(tokenizer), LateTexts(tokenizer)
    expected = ["".join(ready.text for ready in stream.push(Token(id, "", 0.0, []))) for id in ids]
    tokens = [Token(id, "", 0.0, [], late.text_of(id)) for id in ids]
    for number in data.draw(st.permutations(range(len(ids)))):
        assert tokens[number].text == expected[number]
    assert LateTexts(None).text_of(5) == ""
