"""Scores of answers, intervals and comparisons against independent computations; token classes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from fusionroute.fr_export.evaluation.bootstrap import RESAMPLES, compare, interval
from fusionroute.fr_export.evaluation.scoring import bleu, f1
from fusionroute.fr_export.evaluation.token_classes import CLASSES, TokenClasses
from fusionroute.runtime.text import Text
from tests.support.paths import REPOSITORY


def test_f1_of_cases_worked_out_by_hand() -> None:
    cases = {
        ("42", "42"): 1.0,
        ("", ""): 1.0,
        ("", "42"): 0.0,
        ("cat", "dog"): 0.0,
        ("cat sun", "sun cat"): 1.0,  # order does not count
        ("SUN", "sun"): 0.0,  # case does
        ("sun sun", "sun"): 2 / 3,  # precision 1/2, recall 1
        ("[1, 2]", "[1, 2, 3]"): 2 * 1 * (5 / 7) / (1 + 5 / 7),  # [ 1 , 2 ] of [ 1 , 2 , 3 ]
    }
    for (answer, reference), expected in cases.items():
        assert f1(answer, reference) == pytest.approx(expected)


def plain_bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """BLEU-4 as its paper defines it (Papineni et al. 2002), for texts with matches of every order."""
    logs = 0.0
    for order in range(1, 5):
        matches = total = 0
        for answer, reference in pairs:
            ngrams, expected = (Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (answer, reference))
            matches += sum((ngrams & expected).values())
            total += sum(ngrams.values())
        logs += math.log(matches / total) / 4
    lengths = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return 100 * math.exp(min(0.0, 1 - lengths[1] / lengths[0]) + logs)


def test_bleu_is_that_of_its_paper_over_texts_only() -> None:
    pairs = [("sun cat dog red box", "sun cat dog red pen"), ("one two three four", "one two three four five"), ("wrong", "42")]
    answers, references = zip(*pairs, strict=True)
    assert bleu(answers, references) == pytest.approx(plain_bleu([(a.split(), r.split()) for a, r in pairs[:2]]))
    assert bleu(references, references) == pytest.approx(100)
    assert bleu(["42"], ["42"]) is None


def test_intervals_are_those_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    domains = [rng.random(count) < share for count, share in ((2000, 0.9), (1500, 0.3), (800, 0.55))]
    for values in ([domains[0]], domains):
        estimate = interval(values)
        mean = np.mean([own.mean() for own in values])
        error = math.sqrt(sum(own.var() / len(own) for own in values)) / len(values)
        assert estimate.value == pytest.approx(mean)
        assert estimate.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
        assert estimate.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_domains_are_resampled_independently() -> None:
    values = np.random.default_rng(1).random(400) < 0.7
    one, four = interval([values]), interval([values] * 4)
    assert four.value == one.value
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.1)


def test_intervals_of_few_values_are_those_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 3.0, 10.0])
    means = sorted(np.mean(drawn) for drawn in itertools.product(values, repeat=4))
    estimate = interval([values])
    # the exact quantile, give or take one percent of the resamples
    for share, end in ((0.025, estimate.low), (0.975, estimate.high)):
        assert means[int((share - 0.01) * 256)] <= end <= means[min(int((share + 0.01) * 256) + 1, 255)]
    assert interval([np.ones(5)]) == (1.0, 1.0, 1.0)


def test_seeds_and_constants() -> None:
    values = [np.random.default_rng(0).random(50)]
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)


def test_comparisons_are_paired() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(1000) < 0.6
    second = first ^ (rng.random(1000) < 0.04)  # mostly the same prompts right
    comparison = compare([first], [second])
    difference = first.astype(float) - second
    error = difference.std() / math.sqrt(1000)
    assert comparison.difference == pytest.approx(difference.mean())
    assert comparison.high - comparison.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert comparison.high - comparison.low < 0.5 * (interval([first]).high - interval([first]).low)
    assert compare([second], [first]).difference == pytest.approx(-comparison.difference)


def test_p_values() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(1000) < 0.6
    assert compare([first], [first]) == (0.0, 0.0, 0.0, 1.0)
    assert compare([np.ones(100)], [np.zeros(100)]).p == pytest.approx(2 / (RESAMPLES + 1))
    gains = np.zeros(400)
    gains[:24], gains[24:37] = 1, -1  # z = 11 / √37 = 1.81
    z = gains.mean() / (gains.std() / math.sqrt(400))
    assert compare([gains], [np.zeros(400)]).p == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.025)


def test_token_classes() -> None:
    text = Text.load(REPOSITORY / "fr_export" / "tiny" / "gemma2" / "router" / "tokenizer.json")
    classes = TokenClasses(text)

    def of(answer: str) -> dict[str, str]:
        """Visible character → class of the token it starts, for texts of one character per token and white space."""
        ids = text.encode(answer, special=False)
        pieces = [text.decode([id]) for id in ids]
        assert "".join(pieces) == answer
        return {piece.strip() or piece: CLASSES[number] for piece, number in zip(pieces, classes.of(ids), strict=True)}

    assert of("42+5=47") == {"4": "digits", "2": "digits", "+": "operators", "5": "digits", "=": "operators", "7": "digits"}
    listed = of("[1, 2]")
    assert (listed["["], listed["1"], listed[","], listed["]"]) == ("code", "digits", "code", "code")
    assert set(of("sun-cat").values()) == {"words", "marks"} and of("sun-cat")["-"] == "marks"
    assert of("sun, cat")[","] == "marks"
    assert of('{"a": "b"}')['"'] == "marks"
    assert of("\n")["\n"] == "layout"
    assert classes.of([]) == []
    function = text.encode("def f(x):\n    return x - 3", special=False)
    kinds = [CLASSES[number] for number in classes.of(function)]
    assert kinds[0] == "code" and "operators" in kinds and kinds[-1] == "digits"
    assert "words" in kinds  # the names f and x
