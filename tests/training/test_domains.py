import json
import random
import re

import pytest

from fr_export.training.domains import COMPOSITE, DOMAINS, Sample, Split, draw, draw_many, is_test

ALL = (*DOMAINS, COMPOSITE)


def solve(prompt: str) -> str:
    """The right answer, worked out in another way than the generators do."""
    if "\n" in prompt:
        return "\n".join(solve(line) for line in prompt.split("\n"))
    if problem := re.fullmatch(r"\w+ has (\d+) \w+ and (gets|gives) (\d+)\. \w+\?", prompt):
        expression = f"{problem[1]}{'+' if problem[2] == 'gets' else '-'}{problem[3]}"
        return f"{expression}={eval(expression)}"
    if problem := re.fullmatch(r"\w+ has (\d+) bags of (\d+) \w+\. Total\?", prompt):
        return f"{problem[1]}*{problem[2]}={int(problem[1]) * int(problem[2])}"
    if chain := re.fullmatch(r"(\d+\*\d+)(\+\d+)=", prompt):
        return f"{eval(chain[1])}{chain[2]}={eval(chain[1] + chain[2])}"
    if sum_ := re.fullmatch(r"\d+[-+*]\d+=", prompt):
        return str(eval(sum_[0][:-1]))
    if prompt.startswith("def "):
        head, a, b = re.fullmatch(r"def (\w{3})_\w+\((\w), (\w)\):", prompt).groups()  # type: ignore[union-attr]
        return f"    return {a} { {'add': '+', 'sub': '-', 'mul': '*'}[head] } {b}"
    if function := re.fullmatch(r"(\w+) = lambda (\w): (.+)", prompt):
        return f"def {function[1]}({function[2]}):\n    return {function[3]}"
    if prompt[0] == "[" or re.match(r"(sorted|max|min|list)\(", prompt):
        return str(eval(prompt))
    verb, rest = prompt.split(": ", 1)
    words = rest.replace(",", "").split()
    if verb.startswith("Repeat"):
        return " ".join([rest] * int(verb.split()[1]))
    if verb == "Reverse the words":
        return " ".join(reversed(words))
    if verb == "Uppercase":
        return rest.upper()
    if verb == "Number the items":
        return "".join(f"\n{i + 1}. {word}" for i, word in enumerate(words))[1:]
    assert verb == "JSON"
    fields = dict(word.split("=") for word in words)
    return json.dumps({k: str(eval(v)) if k == "total" else v for k, v in fields.items()})


@pytest.mark.parametrize("domain", ALL)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(domain: str, split: Split) -> None:
    for sample in draw_many(domain, split, 300, seed=1):
        assert sample.answer == solve(sample.prompt), sample.prompt
        assert sample.domain == domain


@pytest.mark.parametrize("domain", ALL)
def test_draws_are_deterministic_and_seeded(domain: str) -> None:
    first = draw_many(domain, "train", 50, seed=3)
    assert first == draw_many(domain, "train", 50, seed=3)
    assert first != draw_many(domain, "train", 50, seed=4)
    assert len({sample.prompt for sample in first}) == 50


@pytest.mark.parametrize("domain", ALL)
def test_train_and_test_are_disjoint(domain: str) -> None:
    rng = random.Random(0)
    train = {draw(domain, "train", rng).prompt for _ in range(5000)}
    test = {sample.prompt for sample in draw_many(domain, "test", 200, seed=0)}
    assert not train & test


def test_training_answers_spell_out_no_test_expression() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        answer = draw("math", "train", rng).answer
        assert not any(is_test(found) for found in re.findall(r"\d+[-+]\d+=", answer))


def test_composites_need_two_domains() -> None:
    samples: list[Sample] = draw_many(COMPOSITE, "test", 100, seed=0)
    assert all(len({domain for domain, _ in sample.parts}) == 2 for sample in samples)
