"""Arguments of a wrong type end in one sentence of an InputError, and nothing is taken for what it is not."""

import inspect
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime, InputError, Sampling, Session
from fusionroute.runtime.chat import ChatOptions
from fusionroute.runtime.text_rules import RuleOptions

PROMPT = "A prompt must be a str, a list of token ids, or a list of {'role', 'content'} messages."
IDS = "The token ids are not all whole numbers: pass ids as `encode` gives them."
POSITIONS = "The positions are not all whole numbers: pass a list of them."
HUGE = 10**5000  # Python refuses to write it


@pytest.fixture(scope="module")
def runtime(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], "fp32", "cpu", threads=1) as rt:
        yield rt


@pytest.fixture(scope="module")
def session(runtime: FusionRuntime) -> Session:
    session = runtime.session()
    session.append([5, 6, 7])
    return session


def generating(**options: Any) -> Callable[[FusionRuntime, Session], object]:
    given: dict[str, Any] = {"prompt": [5], "max_new_tokens": 1} | options
    return lambda rt, _: rt.generate(**given)


CALLS: dict[str, tuple[Callable[[FusionRuntime, Session], object], str]] = {
    "prompt None": (generating(prompt=None), PROMPT),
    "prompt 5": (generating(prompt=5), PROMPT),
    "prompt bytes": (generating(prompt=b"12"), PROMPT),
    "prompt bytearray": (generating(prompt=bytearray(b"12")), PROMPT),
    "prompt bools": (generating(prompt=[True, False]), PROMPT),
    "prompt numpy bools": (generating(prompt=np.ones(3, bool)), PROMPT),
    "prompt floats": (generating(prompt=[5.0]), PROMPT),
    "prompt of texts": (generating(prompt=["12", "30"]), PROMPT),
    "prompt dict": (generating(prompt={"role": "user", "content": "x"}), PROMPT),
    "prompt set": (generating(prompt={5, 6}), PROMPT),
    "prompt of both": (generating(prompt=[{"role": "user", "content": "x"}, 5]), PROMPT),
    "prompt rows": (generating(prompt=np.zeros((2, 2), int)), PROMPT),
    "count None": (generating(max_new_tokens=None), "max_new_tokens is None, expected a whole number."),
    "count text": (generating(max_new_tokens="5"), "max_new_tokens is '5', expected a whole number."),
    "count float": (generating(max_new_tokens=1.5), "max_new_tokens is 1.5, expected a whole number."),
    "count infinite": (generating(max_new_tokens=float("inf")), "max_new_tokens is inf, expected a whole number."),
    "count bool": (generating(max_new_tokens=True), "max_new_tokens is True, expected a whole number."),
    "count 0": (generating(max_new_tokens=0), "max_new_tokens=0 is out of range: expected at least 1."),
    "count below all": (generating(max_new_tokens=-HUGE), "max_new_tokens=<int> is out of range: expected at least 1."),
    "lam text": (generating(lam="0.5"), "lam='0.5' is out of range: expected a number from 0 (expert only) to 1 (router only)."),
    "lam bool": (generating(lam=True), "lam=True is out of range: expected a number from 0 (expert only) to 1 (router only)."),
    "fusion 5": (generating(fusion=5), "Unknown fusion 5: use 'weighted' or 'additive'."),
    "fusion of arrays": (generating(fusion=np.zeros(2)), "Unknown fusion array([0., 0.]): use 'weighted' or 'additive'."),
    "expert of arrays": (generating(expert=np.zeros(2)), "Unknown expert array([0., 0.]): use one of expert0, expert1."),
    "expert 5": (generating(expert=5), "Unknown expert 5: use one of expert0, expert1."),
    "stop 5": (generating(stop=5), "stop is 5, expected a str or a list of them."),
    "stop bytes": (generating(stop=b"a"), "The stop string 97 is not a str of at least one character: leave it out."),
    "cancel 5": (generating(cancel=5), "cancel is 5, expected a threading.Event, or None."),
    "deadline text": (generating(deadline="5"), "deadline is '5', expected a number of seconds from now, or None for no deadline."),
    "deadline bool": (generating(deadline=True), "deadline is True, expected a number of seconds from now, or None for no deadline."),
    "deadline huge": (generating(deadline=10**400), f"deadline is 1{'0' * 59}…, expected a number of seconds from now, or None for no deadline."),
    "deadline beyond writing": (generating(deadline=HUGE), "deadline is <int>, expected a number of seconds from now, or None for no deadline."),
    "deadline nan": (generating(deadline=float("nan")), "deadline is nan, expected a number of seconds from now, or None for no deadline."),
    "temperature huge": (generating(temperature=10**400), f"temperature is 1{'0' * 59}…, expected a number."),
    "top_k bool": (generating(top_k=True), "top_k is True, expected a whole number."),
    "seed float": (generating(seed=1.0), "seed is 1.0, expected a whole number."),
    "seed below all": (generating(seed=-HUGE), "seed is <int>, expected a whole number from 0, or None for a fresh one."),
    "callback": (generating(on_token=5), "on_token is 5, expected a function of a token, or None."),
    "score None": (lambda rt, _: rt.score(None), IDS),  # type: ignore[arg-type]
    "score text": (lambda rt, _: rt.score("12"), IDS),  # type: ignore[arg-type]
    "score nan": (lambda rt, _: rt.score([5], [float("nan")]), POSITIONS),  # type: ignore[list-item]
    "score half": (lambda rt, _: rt.score([5, 6], [0.5]), POSITIONS),  # type: ignore[list-item]
    "score texts": (lambda rt, _: rt.score([5, 6], ["0"]), POSITIONS),  # type: ignore[list-item]
    "score one position": (lambda rt, _: rt.score([5, 6], 1), POSITIONS),  # type: ignore[arg-type]
    "score chunk": (lambda rt, _: rt.score([5], chunk=1.5), "chunk is 1.5, expected a whole number."),  # type: ignore[arg-type]
    "score chunk 0": (lambda rt, _: rt.score([5], chunk=0), "chunk=0 is out of range: expected at least 1."),
    "rewind float": (lambda _, s: s.rewind(1.5), "The number of tokens to keep is 1.5, expected a whole number."),  # type: ignore[arg-type]
    "rewind bool": (lambda _, s: s.rewind(True), "The number of tokens to keep is True, expected a whole number."),
    "rewind far": (lambda _, s: s.rewind(HUGE), "Cannot rewind to <int> tokens: the session holds 3."),
    "steps text": (lambda _, s: s.steps("1"), "most is '1', expected a whole number."),  # type: ignore[arg-type]
    "append bytes": (lambda _, s: s.append(b"12"), IDS),
    "append bools": (lambda _, s: s.append([True]), IDS),
    "append None": (lambda _, s: s.append(None), IDS),  # type: ignore[arg-type]
    "append huge": (lambda rt, s: s.append([HUGE]), "Token id <int> is outside the vocabulary: expected 0 to 299."),
    "decode None": (lambda rt, _: rt.decode(None), IDS),  # type: ignore[arg-type]
    "decode bytes": (lambda rt, _: rt.decode(b"12"), IDS),
    "encode bytes": (lambda rt, _: rt.encode(b"12"), "The text is not a str of valid Unicode characters: pass text that was decoded as UTF-8."),  # type: ignore[arg-type]
    "unknown option of a step": (
        lambda _, session: session.step(temprature=1.0),  # type: ignore[call-arg]
        "Unknown option temprature (temperature?): expected some of temperature, top_k, top_p, min_p, repetition_penalty, seed, "
        "presence_penalty, frequency_penalty, logit_bias, top_logprobs, candidates.",
    ),
    "tools without messages": (
        lambda rt, _: rt.generate("1", tools=[]),
        "tools is for the chat template: pass the prompt as a list of {'role', 'content'} messages.",
    ),
    "documents with ids": (
        lambda rt, _: rt.prompt_ids([1, 2], documents=[{"text": "x"}]),
        "documents is for the chat template: pass the prompt as a list of {'role', 'content'} messages.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(runtime: FusionRuntime, session: Session, name: str) -> None:
    call, sentence = CALLS[name]
    with pytest.raises(InputError) as caught:
        call(runtime, session)
    assert str(caught.value) == sentence
    assert session.token_ids == [5, 6, 7]


LOADS: dict[str, tuple[dict[str, Any], str]] = {
    "bundle None": ({"bundle": None}, "bundle is None, expected a path."),
    "bundle bytes": ({"bundle": b"x"}, "bundle is b'x', expected a path."),
    "bundle with a null": ({"bundle": "a\0b"}, "bundle is 'a\\x00b', expected a path."),
    "threads text": ({"threads": "2"}, "threads='2' is out of range: expected 1 to 1024, or None for all cores."),
    "threads half": ({"threads": 1.5}, "threads=1.5 is out of range: expected 1 to 1024, or None for all cores."),
    "threads too many": ({"threads": 10**30}, f"threads={10**30} is out of range: expected 1 to 1024, or None for all cores."),
    "threads bool": ({"threads": True}, "threads=True is out of range: expected 1 to 1024, or None for all cores."),
    "texts": ({"prefix_cache": "1"}, "prefix_cache='1' is out of range: expected the number of texts to keep, or 0 for none."),
    "precision": ({"precision": ["int8"]}, "precision is ['int8'], expected a str."),
    "device": ({"device": 5}, "Unknown device 5: use one of auto, cpu, cuda, tensorrt, rtx, ort-tensorrt, ort-rtx."),
    "exact": ({"exact": "no"}, "exact is 'no', expected True or False."),
    "share": ({"share_weights": 1}, "share_weights is 1, expected True or False."),
    "verify": ({"verify": "no"}, "verify is 'no', expected True or False."),
    "failure": ({"on_expert_failure": "ignore"}, "Unknown on_expert_failure 'ignore': use 'raise' or 'router_only'."),
    "catch-up": ({"catch_up": 5}, "Unknown catch_up 5: use 'lazy' or 'background'."),
    "speculation": ({"speculation": True}, "Unknown speculation True: use 'off' or 'auto'."),
}


@pytest.mark.parametrize("name", LOADS)
def test_loads_that_are_refused(bundles: list[Path], name: str) -> None:
    options, sentence = LOADS[name]
    with pytest.raises(InputError) as caught:
        FusionRuntime.load(**{"bundle": bundles[0]} | options)
    assert str(caught.value) == sentence


def test_numbers_of_other_types_are_taken_as_what_they_are(runtime: FusionRuntime) -> None:
    expected = runtime.generate([5, 6], 2, temperature=0.5, seed=3).token_ids
    same: Any = {"temperature": np.float32(0.5), "seed": np.int64(3), "deadline": Fraction(60), "cancel": threading.Event()}
    assert runtime.generate(np.array([5, 6], np.int32), np.int8(2), **same).token_ids == expected  # type: ignore[arg-type]
    assert runtime.generate((5, 6), 2, temperature=0.5, seed=3).token_ids == expected
    assert runtime.generate(iter([5, 6]), 2, temperature=0.5, seed=3).token_ids == expected  # type: ignore[arg-type]


VALUES = (None, True, 0, -1, 3, 10**400, 0.5, float("nan"), float("inf"), 1j, "", "ab", b"ab", object(), int, np.zeros(2), np.True_)
ANYTHING = st.recursive(st.sampled_from(VALUES), lambda inner: st.lists(inner, max_size=3) | st.just({"role": "user"}), max_leaves=4)
DEFAULTS: dict[str, Any] = {"prompt": [5, 6], "max_new_tokens": 1}
NAMES = ("prompt", "max_new_tokens", "stop", "fusion", "lam", "expert", "cancel", "deadline", "temperature", "top_k", "top_p", "min_p",
         "repetition_penalty", "seed", "on_token", "presence_penalty", "frequency_penalty", "logit_bias", "top_logprobs", "candidates",
         "stop_token_ids", "ignore_eos", "min_new_tokens")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(options=st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3))
def test_anything_at_all_is_answered_or_refused(runtime: FusionRuntime, options: dict[str, Any]) -> None:
    try:
        result = runtime.generate(**(DEFAULTS | options))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert len(result.token_ids) <= runtime.max_seq_len


def test_an_unknown_option_is_told_all_known_ones(runtime: FusionRuntime) -> None:
    """Those that the method declares, and those of sampling, of a text's form and of chat templates that it passes on."""
    declared = {name for name in inspect.signature(FusionRuntime.stream).parameters if name not in ("self", "prompt", "options")}
    expected = declared | set(Sampling.__dataclass_fields__) | set(RuleOptions.__annotations__) | set(ChatOptions.__annotations__)
    for call, more in ((runtime.stream, set()), (runtime.generate, {"on_token"})):
        with pytest.raises(InputError) as caught:
            call("x", max_tokens=5)  # type: ignore[call-arg]
        begin, _, names = str(caught.value).rstrip(".").partition(": expected some of ")
        assert begin == "Unknown option max_tokens (max_new_tokens?)"
        assert set(names.split(", ")) == expected | more
