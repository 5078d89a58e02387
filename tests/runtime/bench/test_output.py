"""What a benchmark shows: a page, charts and a table, against the object that `--json` prints."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.runtime.bench.conftest import FEW, measured
from tests.runtime.commands.conftest import command
from tests.runtime.commands.test_commands import assert_one_sentence
from tests.support.commands import Command

__all__ = ["command"]


class Page(HTMLParser):
    """What a page refers to, and whether all its elements are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.text = self.figures = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [str(value) for name, value in attributes if name in ("href", "src", "xlink:href", "srcset", "data")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] == ["pre"]:
            self.figures += data


def test_page_and_picture(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    named = Path(shutil.copytree(bundles[0], tmp_path / "<b>&bundle"))
    result = measured(command, named, "--html", page, "--plot", picture)
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert "http" not in text.lower() and "@import" not in text and all(link.startswith("#") for link in parsed.links)
    assert not parsed.open and parsed.seen["svg"] == 1 and parsed.seen["table"] == 2 and "b" not in parsed.seen
    for row in result["rows"]:
        assert f"{row['tokens_per_second']:,.1f}" in parsed.text
    assert json.loads(parsed.figures) == result
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_charts_hold_the_figures(bundles: list[Path], command: Command) -> None:
    pytest.importorskip("matplotlib")
    from fusionroute.runtime.bench.figure import figure

    result = measured(command, bundles[0], "--rows", "fused,router")
    result["precisions"][1]["quality"] = {"perplexity_ratio": 1.02}
    speed, _, quality, size = figure(result).axes
    assert [bar.get_height() for bar in speed.patches] == [row["tokens_per_second"] for row in result["rows"]]
    rows = {row["precision"]: row for row in result["rows"] if row["system"] == "fused"}
    [point] = quality.collections
    assert point.get_offsets().tolist() == [[pytest.approx(2.0), rows[result["precisions"][1]["name"]]["tokens_per_second"]]]
    assert [c.get_offsets().tolist()[0] for c in size.collections] == [
        [each["bytes"] / 1e6, rows[each["name"]]["tokens_per_second"]] for each in result["precisions"]
    ]


def test_table(bundles: list[Path], command: Command) -> None:
    ended = command("bench", bundles[0], *FEW)
    assert ended.status == 0
    for word in (
        "9 tokens of prompt, 12 new ones, median of 3",
        "memory read at 20.0 GB/s",
        "fp32",
        "int8",
        "tokens/s",
        "not engines on a GPU",
    ):
        assert word in ended.out


def test_without_matplotlib(bundles: list[Path], command: Command, tmp_path: Path) -> None:
    with patch.dict("sys.modules", {"matplotlib.figure": None}):
        for option in ("--plot", "--html"):
            ended = command("bench", bundles[0], option, tmp_path / "file.png")
            assert ended.status == 1 and ended.out == ""
            assert_one_sentence(ended.err, "matplotlib", "fusionroute[bench]")
        assert command("bench", bundles[0], *FEW).status == 0
