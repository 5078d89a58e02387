"""A headless Chromium, the system's, in which a page may reach one host only. Needs Playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = os.environ.get("FUSIONROUTE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root, as in containers, has none
        yield chromium
        chromium.close()


def opened(chromium: Any, url: str, complaints: list[str], **context: Any) -> Any:
    """A page. `complaints` gets what the console says, errors, dialogs, and requests to other hosts than the page's."""
    page = chromium.new_context(accept_downloads=True, **context).new_page()
    host = "/".join(url.split("/")[:3])
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def refuse(dialog: Any) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    def check(request: Any) -> None:
        if not request.url.startswith((host, "data:", "blob:")):
            complaints.append(request.url)

    page.on("dialog", refuse)
    page.on("request", check)
    page.goto(url)
    return page


def ask(page: Any, text: str) -> None:
    """Type a question, send it with the keyboard, and wait for the whole answer."""
    turns = page.locator(".turn").count()
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(f".turn:nth-child({turns + 1})", timeout=60_000)
    page.wait_for_selector("#send:not([disabled])", timeout=180_000)
