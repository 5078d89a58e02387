"""The paper's argument, measured on an exported system: fusion reaches what choosing among experts cannot."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples import theory
from examples.theory import EXPERTS, LAMBDAS, PROMPT, STEPS, TARGET, Policy, fused, make_bundle, policies, selections, table
from fusionroute.runtime import FusionRuntime

LENGTH = len(TARGET)
BEFORE = (PROMPT + TARGET)[:LENGTH]
TABLES = {name: table(name) for name in ("router", *EXPERTS)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("theory"))


@pytest.fixture(scope="module")
def rt(bundle: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundle) as runtime:
        yield runtime


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits.astype(np.float64))
    return np.asarray(odds / odds.sum(-1, keepdims=True))


def right(logits: np.ndarray) -> np.ndarray:
    """Probability of the right word at each step, from logits [T, V]."""
    return np.asarray(softmax(logits)[np.arange(LENGTH), TARGET])


def routed() -> np.ndarray:
    """Logits [T, V] of the expert that the router chooses at each step, from the tables."""
    return np.stack([TABLES[step.chosen][before] for before, step in zip(BEFORE, STEPS, strict=True)])


def test_the_bundle_computes_the_tables(rt: FusionRuntime) -> None:
    logits = {policy.name: policy.logits for policy in policies(rt)}
    for name in EXPERTS:
        np.testing.assert_allclose(logits[f"expert {name}"], TABLES[name][BEFORE], atol=2e-5)
    np.testing.assert_allclose(logits["router"], TABLES["router"][BEFORE], atol=2e-5)
    np.testing.assert_allclose(logits["fusion"], (TABLES["router"][BEFORE] + routed()) / 2, atol=2e-5)
    np.testing.assert_allclose(fused(rt, 0.0), routed(), atol=2e-5)


def test_no_sequence_of_choices_writes_the_text(rt: FusionRuntime) -> None:
    texts = selections(rt)
    expected = []
    for choices in itertools.product(EXPERTS, repeat=LENGTH):
        last, text = PROMPT[-1], []
        for name in choices:
            last = int(TABLES[name][last].argmax())
            text.append(last)
        expected.append(text)
    assert len(texts) == 2**LENGTH
    assert texts == expected
    assert TARGET not in texts
    wrong = [
        step.word for step, *own in zip(STEPS, *(TABLES[name][BEFORE].argmax(-1) != TARGET for name in EXPERTS), strict=True) if all(own)
    ]
    assert wrong == ["expert", "the"]  # without these two steps, choosing would be enough


def test_only_the_fusion_writes_the_text(rt: FusionRuntime) -> None:
    limit = LENGTH + 5
    fusion = rt.generate(PROMPT, max_new_tokens=limit, lam=0.5)
    assert fusion.token_ids == TARGET and fusion.finish_reason == "stop"
    assert fusion.experts == [step.chosen for step in STEPS]
    assert rt.generate(PROMPT, max_new_tokens=limit, fusion="additive").token_ids == TARGET
    for name in EXPERTS:
        assert rt.generate(PROMPT, max_new_tokens=limit, lam=0.0, expert=name).token_ids != TARGET
    assert rt.generate(PROMPT, max_new_tokens=limit, lam=0.0).token_ids != TARGET
    assert rt.generate(PROMPT, max_new_tokens=limit, lam=1.0).token_ids != TARGET
    all_wrong = STEPS.index(next(step for step in STEPS if step.word == "the"))
    assert all(TABLES[name][BEFORE[all_wrong]].argmax() != TARGET[all_wrong] for name in TABLES)


def test_the_router_chooses_the_best_expert(rt: FusionRuntime) -> None:
    """So the gain of the fusion is not due to poor routing."""
    best = np.maximum(*(right(TABLES[name][BEFORE]) for name in EXPERTS))
    np.testing.assert_allclose(Policy("routed", fused(rt, 0.0)).right, best, rtol=1e-4)


def test_values(rt: FusionRuntime) -> None:
    values = {policy.name: policy.value for policy in policies(rt)}
    each = np.stack([right(TABLES[name][BEFORE]) for name in EXPERTS])
    assert values["expert a"] == pytest.approx(each[0].prod(), rel=1e-3)
    assert values["expert b"] == pytest.approx(each[1].prod(), rel=1e-3)
    assert values["best choice"] == pytest.approx(max(np.prod(own) for own in itertools.product(*each.T)), rel=1e-3)
    assert values["router"] == pytest.approx(right(TABLES["router"][BEFORE]).prod(), rel=1e-3)
    assert values["fusion"] == pytest.approx(right((TABLES["router"][BEFORE] + routed()) / 2).prod(), rel=1e-3)
    assert values["best choice"] < 0.08 and values["router"] < 0.001 and values["fusion"] > 0.85


def test_a_sampled_text_is_worth_its_value(rt: FusionRuntime) -> None:
    """Sampled texts are right as often as the logits predict."""
    runs = 100
    for lam in (0.0, 0.5):
        value = Policy("", fused(rt, lam)).value
        hits = sum(
            rt.generate(PROMPT, max_new_tokens=LENGTH, lam=lam, temperature=1.0, seed=seed).token_ids == TARGET for seed in range(runs)
        )
        assert abs(hits / runs - value) < 4 * (value * (1 - value) / runs) ** 0.5


def test_the_best_lambda_lies_between(rt: FusionRuntime) -> None:
    values = [Policy("", fused(rt, lam)).value for lam in LAMBDAS]
    for lam, value in zip(LAMBDAS, values, strict=True):
        assert value == pytest.approx(right(lam * TABLES["router"][BEFORE] + (1 - lam) * routed()).prod(), rel=1e-3)
    assert 0.3 < LAMBDAS[int(np.argmax(values))] < 0.6


def test_the_example_shows_it(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(theory, "make_bundle", lambda folder: bundle)
    theory.main(str(tmp_path / "picture.png"))
    shown = capsys.readouterr().out
    assert "256 sequences of expert choices write 0 times the right text." in shown
    assert "The fusion writes: what no expert knows the router can add\n" in shown
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
