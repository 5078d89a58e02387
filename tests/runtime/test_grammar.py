"""Texts that follow a grammar: against validators, brute force over the vocabulary, and plain decoding."""

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusionroute.runtime import FusionRuntime, Grammar, InputError, UnavailableError
from fusionroute.runtime.backends.ort_cpu import OrtCache
from fusionroute.runtime.grammar_masks import GrammarMasks
from fusionroute.runtime.limits import MAX_ROUND_TOKENS
from tests.support.speculation import draft_always, same

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUMBER = r"[0-9]{3}-[a-c]{2}"
CHOICE = 'start: "yes" | "no" " way"'


@pytest.fixture(scope="module")
def rt(bundles: list[Path]) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundles[0], precision="fp32") as runtime:
        yield runtime


def test_texts_follow_their_grammar(rt: FusionRuntime) -> None:
    options: list[dict[str, Any]] = [{}, *({"temperature": 1.5, "seed": seed} for seed in range(4))]
    for each in options:
        result = rt.generate("12+30=", 120, grammar=Grammar.json_schema(PERSON), **each)
        jsonschema.validate(json.loads(result.text), PERSON)
        number = rt.generate("12+30=", 40, grammar=Grammar.regex(NUMBER), **each)
        choice = rt.generate("12+30=", 40, grammar=Grammar.lark(CHOICE), **each)
        assert re.fullmatch(NUMBER, number.text) and choice.text in ("yes", "no way")
        assert result.finish_reason == number.finish_reason == choice.finish_reason == "stop"


def test_any_json_object(rt: FusionRuntime) -> None:
    bias = {rt.encode('"')[-1]: 40.0, rt.encode("}")[-1]: 20.0}  # the shortest one
    result = rt.generate("12+30=", 40, grammar=Grammar.json_object(), logit_bias=bias)
    assert result.finish_reason == "stop" and isinstance(json.loads(result.text), dict)


names = st.sampled_from(["a", "b", "name", "x_1"])
schemas = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 40}, {"type": "boolean"}, {"type": "null"},
            {"type": "string", "maxLength": 6}, {"enum": ["on", "off", 3]}, {"const": "fixed"}, {"type": "string", "pattern": "^[a-d]{1,3}$"},
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)}),
        st.dictionaries(names, inner, min_size=1, max_size=3).map(
            lambda fields: {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)  # fmt: skip


def valid(rt: FusionRuntime, schema: dict[str, Any], seed: int) -> None:
    result = rt.generate([5, 6, 7], rt.max_seq_len - 3, grammar=Grammar.json_schema(schema), temperature=0.9, seed=seed)
    assert result.finish_reason == "stop", (schema, result.text)
    jsonschema.validate(json.loads(result.text), schema)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, seed=st.integers(0, 99))
def test_schemas_at_random(rt: FusionRuntime, schema: dict[str, Any], seed: int) -> None:
    valid(rt, schema, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99))
def test_many_schemas_at_random(rt: FusionRuntime, schema: dict[str, Any], seed: int) -> None:
    valid(rt, schema, seed)


def allowed(rt: FusionRuntime, grammar: Grammar, answer: list[int]) -> set[int]:
    """Which tokens may follow, by a matcher that read the answer at once: each was asked for on its own.

    Where the next bytes are certain, llguidance allows the tokenizer's own token for them alone.
    """
    rt._grammars.masks(grammar)  # compiles
    matcher = rt._grammars._matchers[grammar].deep_copy()
    matcher.consume_tokens(answer)
    assert not matcher.is_error()
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    ids = set(np.flatnonzero(bits[: rt.vocab_size]).tolist())
    alone = {id for id in range(rt.vocab_size) if matcher.validate_tokens([id])}
    ends = set(rt.bundle.manifest.eos_token_ids)
    assert ids & ends == (ends if matcher.is_accepting() else set())
    assert ids - ends <= alone and (ids - ends == alone - ends or matcher.compute_ff_bytes())
    return ids


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**30))
def test_masks_are_those_of_every_token_alone(rt: FusionRuntime, seed: int) -> None:
    """Along texts that grow by one or several tokens and are cut again, as drafts are."""
    random = np.random.default_rng(seed)
    grammar = Grammar.regex(r"([a-c]{1,3}[0-9]+ )*x") if seed % 2 else Grammar.json_schema(PERSON)
    masks, prompt = rt._grammars.masks(grammar), [9, 9, 9]
    text, unchanged = list(prompt), 0
    for _ in range(10):
        if random.random() < 0.4:
            cut = int(random.integers(len(prompt), len(text) + 1))
            del text[cut:]
            unchanged = min(unchanged, cut)
        first = len(text)
        for _ in range(random.integers(0, MAX_ROUND_TOKENS)):
            masks.cut(unchanged - len(prompt))
            unchanged = len(text)
            if masks.complete(text, len(prompt)):
                break
            masks.prepare(text, len(prompt), len(text) - len(prompt), len(text) - len(prompt))
            choices = np.flatnonzero(~masks.forbidden(len(text) - len(prompt)))
            token = int(random.choice(choices))
            if token in rt.bundle.manifest.eos_token_ids:
                break
            text.append(token)
        masks.cut(unchanged - len(prompt))
        unchanged = len(text)
        lengths = range(max(first, len(text) - MAX_ROUND_TOKENS), len(text) + 1)
        masks.prepare(text, len(prompt), lengths[0] - len(prompt), lengths[-1] - len(prompt))
        for length in (lengths[0], lengths[-1]):
            forbidden = masks.forbidden(length - len(prompt))
            assert set(np.flatnonzero(~forbidden).tolist()) == allowed(rt, grammar, text[len(prompt) : length])


@pytest.mark.parametrize("grammar", [Grammar.json_schema(PERSON), Grammar.regex(NUMBER)], ids=["schema", "expression"])
def test_drafts_change_no_greedy_token(grammar: Grammar, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    draft_always(monkeypatch)
    assert same(bundles[0], "fp32", 3, False, grammar=grammar, presence_penalty=0.3) > 0


def test_drafts_keep_the_distribution(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of sampled texts against the masked distribution of teacher-forced logits."""
    draft_always(monkeypatch)
    count, ids = 120, [5, 6, 7, 5, 6]
    with FusionRuntime.load(bundles[0], precision="fp32", speculation="auto") as rt:
        grammar = Grammar.regex("[ab]{2}")
        results = [rt.generate(ids, 4, grammar=grammar, temperature=1.5, seed=seed) for seed in range(count)]
        counts = Counter(tuple(result.token_ids) for result in results)
        expected: dict[tuple[int, ...], float] = {}
        pending: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        while pending:
            answer, probability = pending.pop()
            if answer and rt._grammars.masks(grammar).complete(answer, 0):
                expected[answer] = probability
                continue
            row = rt.score([*ids, *answer]).logits[-1].astype(np.float64) / 1.5
            choices = sorted(allowed(rt, grammar, list(answer)))
            weights = np.exp(row[choices] - row[choices].max())
            pending += [((*answer, id), probability * weight) for id, weight in zip(choices, weights / weights.sum(), strict=True)]
    assert set(counts) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    square = sum((counts[each] - count * p) ** 2 / (count * p) for each, p in expected.items() if count * p > 1)
    assert square < 3 * len(expected) + 20
    assert sum(result.drafted for result in results) > count


def test_masks_are_computed_by_another_thread_that_starts_before_the_models(rt: FusionRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    threads: set[int] = set()
    forward, prepare, compute = OrtCache.forward, GrammarMasks.prepare, GrammarMasks._compute

    def noted(self: Any, *arguments: Any) -> Any:
        events.append("models")
        return forward(self, *arguments)

    def preparing(self: GrammarMasks, *arguments: Any) -> None:
        work = self._work
        prepare(self, *arguments)
        if self._work is not work and self._work is not None:
            events.append("mask")

    def computing(self: GrammarMasks, *arguments: Any) -> None:
        threads.add(threading.get_ident())
        compute(self, *arguments)

    monkeypatch.setattr(OrtCache, "forward", noted)
    monkeypatch.setattr(GrammarMasks, "prepare", preparing)
    monkeypatch.setattr(GrammarMasks, "_compute", computing)
    result = rt.generate("12+30=", 30, grammar=Grammar.regex("[0-9]{8}"))
    steps = " ".join(events).replace("models", "-").replace("mask", "m")
    assert re.fullmatch(r"(m( -)+ ?)+", steps)
    assert events[0] == "mask" and events.count("mask") == len(result.token_ids)
    assert threads and threading.get_ident() not in threads


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a type that there is not": (lambda: Grammar.json_schema({"type": "foo"}), "The JSON schema is refused: Invalid type: foo."),
    "a schema that is no JSON": (
        lambda: Grammar.json_schema("{"),
        "The JSON schema is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): "
        "pass a dict, or a str of JSON.",
    ),
    "a list": (lambda: Grammar.json_schema("[1]"), "The JSON schema is [1], expected a dict, or a str of JSON."),
    "not a number": (
        lambda: Grammar.json_schema({"const": math.nan}),
        "The JSON schema cannot be written as JSON (Out of range float values are not JSON compliant",
    ),
    "exactly one": (
        lambda: Grammar.json_schema({"oneOf": [{"type": "integer"}, {"minimum": 2}]}),
        "The JSON schema is refused: oneOf constraints are not supported.",
    ),
    "look-ahead": (
        lambda: Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}),
        "The JSON schema is refused: regex parse error: (?=a)b error: look-around, including look-ahead and look-behind, is not supported.",
    ),
    "an expression": (
        lambda: Grammar.regex("(["),
        'The expression is refused: at 1(8): invalid regex "([" (in regex): regex parse error: ([ error: unclosed character class.',
    ),
    "a name": (lambda: Grammar.lark("start: foo"), 'The grammar is refused: at 1(8): unknown name: "foo".'),
    "no text at all": (lambda: Grammar.regex(r"[^\s\S]"), "The grammar allows no text, or none that goes on from here: widen it."),
    "a reference to itself": (
        lambda: Grammar.json_schema({"$ref": "#"}),
        "The grammar allows no text, or none that goes on from here: widen it.",
    ),
    "a reference to elsewhere": (
        lambda: Grammar.json_schema({"$ref": "http://127.0.0.1:1/x.json"}),
        "The JSON schema is refused: Resource 'http://127.0.0.1:1/x.json' is not present in a registry and retrieving it failed: "
        "Default retriever does not fetch resources.",
    ),
    "too many ways to go on": (
        lambda: Grammar.lark("start: " + " | ".join(f'"a{n}" "b{n}"' for n in range(3000))),
        "The grammar cannot be followed any further (Parser Error: Current row has",
    ),
    "a surrogate": (lambda: Grammar.regex("\ud800"), "The expression is refused: 'utf-8' codec can't encode character"),
    "no grammar": (lambda: "[0-9]", "grammar is '[0-9]', expected a Grammar, such as Grammar.json_schema(…)."),
    "too long": (lambda: Grammar.regex("a" * (1 << 20) + "b"), "The grammar has 1048577 characters, expected at most 1048576."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_grammar_is_one_sentence(name: str, rt: FusionRuntime) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(InputError) as caught:
        rt.generate("a", 5, grammar=make())
    assert "\n" not in str(caught.value) and "<" not in str(caught.value)
    assert str(caught.value) == sentence or (sentence[-1] != "." and str(caught.value).startswith(sentence))  # others' words, cut here


def test_what_a_grammar_needs(rt: FusionRuntime, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^A grammar ends a text with an end-of-sequence token: leave out ignore_eos or the grammar\.$"):
        rt.generate("a", 5, grammar=Grammar.regex("a"), ignore_eos=True)
    rt._grammars._tokenizer = None
    rt._grammars._matchers.clear()
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UnavailableError, match=r"^A grammar needs the package 'llguidance': pip install 'fusionroute\[grammar\]'\.$"):
        rt.generate("a", 5, grammar=Grammar.regex("a"))
