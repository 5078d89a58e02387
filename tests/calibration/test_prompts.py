"""Prompts from the built-in set and from files; which files are refused, and in what words."""

from pathlib import Path

import pytest

from calibration.prompts import BUILTIN, load_prompts
from runtime.errors import InputError


def test_builtin() -> None:
    assert load_prompts() == load_prompts("builtin") == list(BUILTIN)
    assert all(prompt.strip() for prompt in BUILTIN)


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
    "not JSON": ("p.jsonl", b'"one"\n\ntwo\n', r"Line 3 of .*p\.jsonl is not JSON .*; expected one JSON string or object per line"),
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
