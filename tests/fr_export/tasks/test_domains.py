import contextlib
import hashlib
import io
import json
import random
import re

import pytest

from fusionroute.fr_export.tasks.domains import ALL_DOMAINS, COMPOSITE, DOMAINS, UNSEEN, Split, draw, draw_many, split_of
from fusionroute.fr_export.tasks.mistakes import mistake

TRAINED = (*DOMAINS, COMPOSITE)


def solve(prompt: str) -> str:
    """The right answer, worked out in another way than the generators do."""
    if program := re.fullmatch(r"(.*\n)?(\w = \d\n\w = \d\nprint\(.+\))(\n.*)?", prompt):
        before, lines, after = program.groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(lines, {})
        around = [solve(text.strip("\n")) if text else None for text in (before, after)]
        return "\n".join(text for text in (around[0], printed.getvalue().strip(), around[1]) if text is not None)
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
    if verb.startswith("Join with"):
        return {"dashes": "-", "commas": ", "}[verb.split()[-1]].join(words)
    if verb == "Number the items":
        return "".join(f"\n{i + 1}. {word}" for i, word in enumerate(words))[1:]
    assert verb == "JSON"
    fields = dict(word.split("=") for word in words)
    return json.dumps({k: str(eval(v)) if k == "total" else v for k, v in fields.items()})


@pytest.mark.parametrize("domain", ALL_DOMAINS)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_answers_are_right(domain: str, split: Split) -> None:
    if (domain, split) == (UNSEEN, "train"):
        return
    for sample in draw_many(domain, split, 300, seed=1):
        assert sample.answer == solve(sample.prompt), sample.prompt
        assert sample.domain == domain


@pytest.mark.parametrize("domain", TRAINED)
def test_draws_are_deterministic_and_seeded(domain: str) -> None:
    first = draw_many(domain, "train", 50, seed=3)
    assert first == draw_many(domain, "train", 50, seed=3)
    assert first != draw_many(domain, "train", 50, seed=4)
    assert len({sample.prompt for sample in first}) == 50


@pytest.mark.parametrize("domain", TRAINED)
def test_splits_are_disjoint(domain: str) -> None:
    rng = random.Random(0)
    hashes = {
        split: {hashlib.sha256(draw(domain, split, rng).prompt.encode()).hexdigest() for _ in range(3000)}
        for split in ("train", "validation", "test")
    }
    assert not hashes["train"] & hashes["test"]
    assert not hashes["train"] & hashes["validation"]
    assert not hashes["validation"] & hashes["test"]


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_there_are_enough_test_prompts(domain: str) -> None:
    assert len(draw_many(domain, "test", 5000, seed=0)) == 5000


def test_training_answers_spell_out_no_held_out_expression() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        answer = draw("math", "train", rng).answer
        assert all(split_of(expression) == "train" for expression in re.findall(r"\d+[-+]\d+=", answer))


@pytest.mark.parametrize("domain", [COMPOSITE, UNSEEN])
def test_composites_need_two_domains(domain: str) -> None:
    for sample in draw_many(domain, "test", 200, seed=0):
        assert len({name for name, _ in sample.parts}) == 2
        assert ({name for name, _ in sample.parts} == {"code", "instruction"}) == (domain == UNSEEN)


def test_the_unseen_composites_have_no_training_samples() -> None:
    with pytest.raises(ValueError, match="never trained on"):
        draw(UNSEEN, "train", random.Random(0))
    rng = random.Random(0)
    assert all({"code", "instruction"} != {name for name, _ in draw(COMPOSITE, "train", rng).parts} for _ in range(2000))


@pytest.mark.parametrize("domain", TRAINED)
def test_mistakes_are_wrong_but_close(domain: str) -> None:
    rng = random.Random(0)
    for sample in draw_many(domain, "train", 300, seed=2):
        wrong = mistake(sample, rng)
        assert wrong != sample.answer
        assert abs(len(wrong) - len(sample.answer)) <= 8
