"""Names and texts that would move the terminal's cursor, forge its lines or be taken for markup; consoles that are not UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from fusionroute.runtime import BundleError, FusionError
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import one_line, printable
from fusionroute.runtime.terminal import Terminal, spelled, streamed
from tests.support.bundles import edit
from tests.support.paths import REPOSITORY

ESCAPE = "\x1b[31m\x1b]0;title\x07\x1b[2J"
EVIL = {
    "escape": ESCAPE, "newline": "gemma2\nAll 367 files have the hashes of the manifest.", "carriage return": "a\rb", "c1": "\x9b2J",
    "right to left": "\u202egnp.exe", "line separator": "a\u2028b", "nul": "\0", "delete": "\x7f",
}  # fmt: skip


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "runtime", *arguments], cwd=REPOSITORY, env=os.environ | variables, capture_output=True, check=False
    )


def rename(content: dict[str, Any], name: str) -> None:
    old = content["models"][1]["name"]
    content["models"][1]["name"] = name
    for variant in content["variants"]:
        for names in (variant["graphs"], variant["weight_bytes"]):
            names[name] = names.pop(old)


@pytest.mark.parametrize("field", ["family", "expert", "precision", "target"])
@pytest.mark.parametrize("evil", EVIL)
def test_names_that_a_terminal_would_obey_are_refused(bundle: Path, field: str, evil: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if field == "family":
            content["family"] = EVIL[evil]
        elif field == "expert":
            rename(content, EVIL[evil])
        else:
            content["variants"][0][field] = EVIL[evil]

    edit(bundle, change)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert f"{EVIL[evil]!r} has characters that move cursors or end lines" in str(caught.value)
    assert str(caught.value).isprintable()


def test_markup_is_text(bundle: Path) -> None:
    edit(bundle, lambda content: content.update(family="x[/foo][conceal]evil[/]"))
    shown = run("inspect", str(bundle))
    assert shown.returncode == 0 and b"x[/foo][conceal]evil[/]" in shown.stdout


@pytest.mark.parametrize("evil", EVIL)
def test_sentences_spell_control_characters_out(evil: str) -> None:
    spelled_out = printable(EVIL[evil])
    assert spelled_out.isprintable() and str(FusionError(f"a {EVIL[evil]}")) == f"a {spelled_out}"
    assert one_line(ValueError(EVIL[evil])).isprintable()
    assert printable("λ → ü 漢") == "λ → ü 漢"


def test_a_console_prints_texts_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(width=200).print(f"[bold]a{ESCAPE}\nb", Text("c\x1b[2J", "red"))
    assert capsys.readouterr().out == "[bold]a\\x1b[31m\\x1b]0;title\\x07\\x1b[2J\nb c\\x1b[2J\n"
    assert spelled(5) == 5


def test_generated_text_moves_no_cursor() -> None:
    assert streamed(f"line\n\ttab {ESCAPE}\r\x9bü\u200d🙂") == "line\n\ttab \\x1b[31m\\x1b]0;title\\x07\\x1b[2J\\r\\x9bü\u200d🙂"


def test_the_end_of_a_wrong_command_is_spelled_out(bundle: Path) -> None:
    ended = run("generate", f"{bundle}{ESCAPE}", "--prompt", "x")
    assert ended.returncode == 1 and b"\x1b" not in ended.stderr and rb"\x1b[2J" in ended.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_consoles_that_are_not_utf_8(bundle: Path, encoding: str) -> None:
    edit(bundle, lambda content: content.update(family="ﬀ→"))
    shown = run("inspect", str(bundle), PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, b"") and b"\\u03bb = 0" in shown.stdout and rb"\ufb00\u2192" in shown.stdout
    printed = run("inspect", str(bundle), "--json", PYTHONIOENCODING=encoding)
    assert json.loads(printed.stdout.decode("ascii"))["family"] == "ﬀ→"
    generated = run("generate", str(bundle), "--prompt", "12+30=", "--json", PYTHONIOENCODING=encoding)
    assert generated.returncode == 0 and json.loads(generated.stdout.decode("ascii"))["precision"] == "int8"
