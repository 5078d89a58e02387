"""Pictures of the playground for the docs: `python -m tests.browser.screenshots BUNDLE FOLDER [QUESTION …]`."""

import sys
from pathlib import Path
from typing import Any

from fusionroute.runtime import FusionRuntime
from tests.support.browser import ask, browser, opened
from tests.support.server import served

QUESTIONS = (
    "Tom has 17 apples and buys 25 more. How many apples does he have?",
    "Write a Python function that adds two numbers.",
)
VIEWS: dict[str, dict[str, Any]] = {
    "playground": {"viewport": {"width": 1200, "height": 860}, "color_scheme": "light"},
    "playground-dark": {"viewport": {"width": 1200, "height": 860}, "color_scheme": "dark"},
    "playground-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "is_mobile": True, "has_touch": True},
}


def picture(bundle: Path, folder: Path, questions: tuple[str, ...]) -> None:
    """Ask the questions in each view, point at the token that router and expert agree about least, and write FOLDER/VIEW.png."""
    complaints: list[str] = []
    with (
        served(FusionRuntime.load(bundle, speculation="auto", trusted=True), model=bundle.resolve().name) as running,
        browser() as chromium,
    ):
        for name, view in VIEWS.items():
            page = opened(chromium, running.url + "/", complaints, **view)
            for question in questions:
                ask(page, question)
            tokens = page.locator(".turn:last-child .token")
            doubts = []
            for place in range(tokens.count()):
                tokens.nth(place).dispatch_event("click")
                doubts.append(len(set(page.locator(".models li:first-child .name").all_inner_texts())))
            tokens.nth(doubts.index(max(doubts))).dispatch_event("click")
            page.evaluate("scrollTo(0, document.querySelector('.turn:last-child').offsetTop - 330)")
            page.screenshot(path=folder / f"{name}.png")
    if complaints:
        raise SystemExit("\n".join(complaints))


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]) or QUESTIONS)
