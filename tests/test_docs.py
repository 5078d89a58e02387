"""The pages for users and contributors: every link and every named file exists, and prose can be read in a terminal."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "fr_export/tiny/README.md"])
WIDTH = 120
FOLDERS = ("runtime/", "calibration/", "fr_export/", "benchmarks/", "tests/", "docs/", "examples/", ".ci/")
PLACEHOLDERS = re.compile(r"[A-Z]{4,}|[*…<>{}]")  # such as runtime/commands/VERB.py


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines outside code blocks."""
    code = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, line


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as links spell them."""
    headings = [line.lstrip("#").strip() for _, line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere(page: Path) -> None:
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page}:{number} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page}:{number} links to {target}"


def test_every_named_file_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("names files of older releases")
    if page.parent.name == "extending":
        pytest.skip("names files of the examples")
    for number, line in prose(page):
        for name in re.findall(r"`([\w./-]+)`", line):
            if name.startswith(FOLDERS) and not PLACEHOLDERS.search(name):
                assert (REPOSITORY / name).exists(), f"{page}:{number} names {name}"


def test_lines_of_prose_fit_a_terminal(page: Path) -> None:
    if page.name == "refusals.md":
        pytest.skip("lists messages as the source has them")
    long = [number for number, line in prose(page) if len(line) > WIDTH and not line.startswith(("|", "  `CMAKE_ARGS"))]
    assert not long, f"{page} has lines of more than {WIDTH} characters: {long}"


def test_the_walk_to_a_new_family_shows_lines_that_were_applied() -> None:
    text = (REPOSITORY / "docs/extending/family.md").read_text(encoding="utf-8")
    applied = ""
    for line in "\n".join(re.findall(r"```diff\n(.*?)```", text, re.DOTALL)).splitlines():
        if line.startswith("+++ b/"):
            applied = (REPOSITORY / line.removeprefix("+++ b/")).read_text(encoding="utf-8")
        elif line.startswith("+"):
            assert line[1:] in applied.splitlines(), line


def test_the_page_of_refusals_is_what_the_source_says() -> None:
    assert subprocess.run([sys.executable, REPOSITORY / ".ci/refusals.py", "--check"], check=False).returncode == 0, (
        "run python .ci/refusals.py"
    )


def test_the_index_names_every_page() -> None:
    index = (REPOSITORY / "docs/README.md").read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "docs").glob("*.md")):
        assert path.name == "README.md" or f"({path.name})" in index
    records = (REPOSITORY / "docs/decisions/README.md").read_text(encoding="utf-8")
    for path in sorted((REPOSITORY / "docs/decisions").glob("0*.md")):
        assert f"({path.name})" in records
