"""Prompts from the built-in set and from files; which files are refused, and in what words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.calibration.prompts import BUILTIN, HELD_OUT, divide, load_parts, load_prompts
from fusionroute.runtime.errors import InputError


def test_builtin() -> None:
    assert load_prompts() == load_prompts("builtin") == list(BUILTIN)
    assert all(prompt.strip() for prompt in (*BUILTIN, *HELD_OUT))
    assert len(set(BUILTIN)) == len(BUILTIN) >= 64 and len(set(HELD_OUT)) == len(HELD_OUT) >= 12
    assert sum(len(text.split()) for text in HELD_OUT) > 1200, "a report on few tokens is coarse"


def test_no_text_is_both_calibrated_and_reported_on() -> None:
    parts = load_parts()
    assert (parts.calibration, parts.held_out, parts.note) == (list(BUILTIN), list(HELD_OUT), None)
    for text in HELD_OUT:
        assert not any(prompt[:30] in text or text[:30] in prompt for prompt in BUILTIN)


def test_parts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join("abcdefghijkl"))
    assert load_parts(str(tmp_path / "p.txt")).held_out == ["e", "j"]
    (tmp_path / "p.txt").write_text("a\na\nb\na")
    assert load_parts(str(tmp_path / "p.txt")).held_out == ["b"], "fewer than five: the last one"


@given(st.lists(st.text(max_size=3), min_size=1, max_size=40))
def test_divide(prompts: list[str]) -> None:
    parts = divide(prompts)
    assert parts == divide(prompts)
    if len(set(prompts)) == 1:
        assert parts.calibration == parts.held_out == prompts[:1]
        assert parts.note is not None and parts.note.startswith("There is a single prompt") and "\n" not in parts.note
        return
    assert parts.note is None
    assert not set(parts.calibration) & set(parts.held_out)
    assert sorted(parts.calibration + parts.held_out) == sorted(set(prompts)), "nothing is lost"
    assert len(parts.held_out) == max(1, len(set(prompts)) // 5)


def test_nothing_to_divide() -> None:
    with pytest.raises(InputError, match="no prompts to divide: expected at least one"):
        divide([])


GOOD: dict[str, tuple[str, bytes, list[str]]] = {
    "lines": ("p.txt", b"one\ntwo\n", ["one", "two"]),
    "blank lines": ("p.txt", b"\none\n\n  \ntwo", ["one", "two"]),
    "Windows": ("p.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", ["one", "two"]),
    "other separators stay": ("p.txt", "one\u2028still one\x0cand still\ntwo".encode(), ["one\u2028still one\x0cand still", "two"]),
    "strings": ("p.jsonl", b'"one"\n\n"two\\nlines"\n', ["one", "two\nlines"]),
    "objects": ("p.jsonl", b'{"prompt": "one", "answer": 5}\n{"text": "two"}\n{"prompt": "three", "text": "no"}', ["one", "two", "three"]),
    "separators in strings": ("p.jsonl", '{"text": "one\u2028two\u0085"}\r\n'.encode(), ["one\u2028two\u0085"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_files(tmp_path: Path, name: str) -> None:
    file, content, expected = GOOD[name]
    (tmp_path / file).write_bytes(content)
    assert load_prompts(str(tmp_path / file)) == expected


BAD: dict[str, tuple[str, bytes, str]] = {
    "other kind": ("p.csv", b"one", r"p\.csv is neither 'builtin' nor a \.txt or \.jsonl file"),
    "not UTF-8": ("p.txt", b"one\n\xff\n", r"p\.txt cannot be read .*; expected a UTF-8 text file"),
    "empty": ("p.txt", b"", r"p\.txt holds no prompts: expected at least one line"),
    "blank": ("p.jsonl", b"\n \n", r"p\.jsonl holds no prompts"),
    "not JSON": (
        "p.jsonl",
        b'"one"\n\ntwo\n',
        r"Line 3 of .*p\.jsonl is not JSON, since it begins with 'two'; expected one JSON string or object per line",
    ),
    "cut off": ("p.jsonl", b'{"prompt": "on', r"Line 1 of .*p\.jsonl is not JSON"),
    "number": ("p.jsonl", b"5", r"Line 1 of .*p\.jsonl holds no prompt: expected a string, or an object with a string 'prompt' or 'text'"),
    "list": ("p.jsonl", b'["one"]', "Line 1 .* holds no prompt"),
    "other object": ("p.jsonl", b'"one"\n{"question": "two"}', "Line 2 .* holds no prompt"),
    "prompt of another type": ("p.jsonl", b'{"prompt": ["one"]}', "Line 1 .* holds no prompt"),
    "blank prompt": ("p.jsonl", b'{"prompt": "  "}', "Line 1 .* holds no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    file, content, words = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_prompts(str(tmp_path / file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "folder.jsonl"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=rf"The prompts {tmp_path / name} cannot be read"):
        load_prompts(str(tmp_path / name))
