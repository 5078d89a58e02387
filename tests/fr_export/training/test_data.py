"""Rows made of text: exactly what generation sees, answers learnt to their end token, and files that are wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import fusionroute.fr_export as fr_export
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.training.data import Encoder, Row, examine_preferences, fitting, read_preferences, read_sft
from fusionroute.runtime.errors import InputError
from tests.support.systems import SHIPPED

TINY = Path(fr_export.__file__).parent / "tiny"
ENDS = {"gemma2": ("<end_of_turn>", "<eos>"), "llama3": ("<|eot_id|>", "<|end_of_text|>")}
TURNS = [
    {"role": "user", "content": "12+30="},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": "return x"},
]


@pytest.fixture(scope="module", params=SHIPPED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(name: str) -> Encoder:
    return Encoder(Checkpoint.open("router", str(TINY / name / "router"), FAMILIES[name]))


@pytest.fixture(scope="module")
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(TINY / name / "router")


def learnt(row: Row, tokenizer: Any) -> list[str]:
    """The texts of the stretches that are learnt."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.learnt, [0]])))
    return [tokenizer.decode(row.ids[start:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def test_plain_text_is_bos_prompt_answer_eos(name: str, encoder: Encoder, tokenizer: Any) -> None:
    row = encoder.plain("12+30=", "42")
    prompt = tokenizer("12+30=")["input_ids"]
    assert row.ids.tolist() == [*prompt, *tokenizer("42", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert learnt(row, tokenizer) == ["42" + ENDS[name][1]]
    assert row.positions.tolist() == list(range(len(prompt) - 1, len(row.ids) - 1))
    assert row.labels.tolist() == row.ids[len(prompt) :].tolist()


def test_chat_is_what_the_template_makes_of_the_whole(name: str, encoder: Encoder, tokenizer: Any) -> None:
    row = encoder.chat([], TURNS)
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(row.ids) == whole[: len(whole.rstrip())]
    end = ENDS[name][0]
    assert learnt(row, tokenizer) == [f"42{end}", f"return x{end}"]
    opened = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)
    assert row.ids[: len(opened)].tolist() == opened
    again = encoder.chat(TURNS[:3], TURNS[3:])  # what belongs to the prompt is not learnt
    assert again.ids.tolist() == row.ids.tolist()
    assert learnt(again, tokenizer) == [f"return x{end}"]


def test_files_hold_texts_or_messages(encoder: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(
        json.dumps({"prompt": "a", "completion": "b\u2028c"}, ensure_ascii=False)
        + "\n\n"
        + json.dumps({"messages": TURNS})
        + "\n"
        + json.dumps({"prompt": TURNS[:1], "completion": TURNS[1:2]})
    )
    rows = read_sft(file, encoder)
    expected = [encoder.plain("a", "b\u2028c"), encoder.chat([], TURNS), encoder.chat(TURNS[:1], TURNS[1:2])]
    assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in expected]
    wrong = [{"role": "assistant", "content": "43"}]
    file.write_text(
        json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"})
        + "\n"
        + json.dumps({"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": wrong})
    )
    pairs = read_preferences(file, encoder)
    assert pairs[0].chosen.ids.tolist() == encoder.plain("1+1=", "2").ids.tolist()
    assert pairs[1].rejected.ids.tolist() == encoder.chat(TURNS[:1], wrong).ids.tolist()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no JSON object, since it ends too early"),
        ("prompt,completion", "no JSON object, since it begins with 'prompt,completion'"),
        ('{"prompt": "a" "completion": "b"}', "no JSON object, since it goes on with '\"completion\": \"b\"}' behind 15 characters"),
        ("1 " + "x" * 99, f"no JSON object, since it goes on with '{'x' * 40}…' behind 2 characters"),
        ("[1]", "expected a JSON object, found a list"),
        ('{"prompt": "a"}', 'expected {"messages"} or {"prompt", "completion"}, found the fields prompt'),
        ('{"prompt": 3, "completion": "b"}', "prompt is a number, completion is a text"),
        ('{"prompt": "a", "completion": " "}', "completion: is empty"),
        ('{"messages": []}', "messages: expected a list of messages, found an empty one"),
        ('{"messages": "a"}', "messages: expected a list of messages, found a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "messages: no message of the role 'assistant'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "messages[0]: expected {"),
        ('{"messages": ["a"]}', "messages[0]: expected {"),
        ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}', "messages[0].content: expected a text"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "messages[0].role: expected system, user, assistant, tool, found 'human'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
         "messages[1].role: 'user' comes after 'user'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}', "messages[1].content: is empty"),
        ('{"prompt": "\\ud800", "completion": "b"}', "prompt: is not valid Unicode"),
    ],
)  # fmt: skip
def test_broken_lines_are_named(encoder: Encoder, tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n' + line + "\n")
    with pytest.raises(InputError) as error:
        read_sft(file, encoder)
    assert str(error.value).startswith(f"{file}:3: ") and problem in str(error.value)


def test_all_problems_and_duplicates_are_collected(encoder: Encoder, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    good = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "source": "mine"}
    turns = {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [{"role": "user", "content": "a"}]}
    lines = [json.dumps(value).encode() for value in (good, good | {"chosen": 2}, good, turns)]
    file.write_bytes(b"\n".join([*lines, b'{"prompt": "\xff"}']))
    data = examine_preferences(file, encoder)
    assert [(problem.line, problem.field) for problem in data.problems] == [(2, ""), (4, "rejected[0].role"), (4, "rejected"), (5, "")]
    assert (data.lines, data.duplicates, len(data.samples)) == ([1, 3], [(3, 1)], 2)
    with pytest.raises(InputError, match=r"data.jsonl:2: .* \(3 more like this: --check-data lists them\)\.$"):
        read_preferences(file, encoder)


def test_wrong_files_end_in_one_sentence(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_sft(tmp_path / "none.jsonl", encoder)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="is empty"):
        read_preferences(tmp_path / "empty.jsonl", encoder)


def test_long_rows_are_skipped_and_counted(encoder: Encoder) -> None:
    rows = [encoder.plain("a", "b" * count) for count in (1, 2, 30)]
    short, skipped = fitting(rows, lambda row: len(row.ids), 10, "samples")
    assert (len(short), skipped) == (2, 1)
    with pytest.raises(InputError, match="All 3 samples are longer than 2 tokens: raise --max-length"):
        fitting(rows, lambda row: len(row.ids), 2, "samples")


def test_templates_that_cannot_be_learnt_from_are_refused(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "router"
    shutil.copytree(TINY / "llama3" / "router", folder)
    for template, reason in (
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "closes the assistant's turn with none of the end tokens"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "rewrites earlier turns"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        encoder = Encoder(Checkpoint.open("router", str(folder), FAMILIES["llama3"]))
        with pytest.raises(InputError, match=reason):
            encoder.chat([], TURNS)
