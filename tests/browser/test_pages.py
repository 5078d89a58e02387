"""The playground and the pages of answers in a real browser.

Slow, in an environment of its own, and with the system's Chromium: `make test-browser`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.view.page import answer_page
from tests.support.browser import CHROMIUM, ask, browser, opened
from tests.support.exporting import export_shipped
from tests.support.pages import answer_in

pytestmark = pytest.mark.slow
pytest.importorskip("playwright", reason="the browser has an environment of its own: make test-browser")
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium, or set FUSIONROUTE_CHROMIUM", allow_module_level=True)

HOSTILE = "</script><img src=x onerror=alert(1)>"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_shipped(tmp_path_factory.mktemp("bundle") / "gemma2", "gemma2", ("fp32", "int8"))


@pytest.fixture(scope="module")
def rt(bundle: Path) -> Iterator[FusionRuntime]:
    with FusionRuntime.load(bundle, "fp32", "cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    from tests.support.server import served

    with served(*(FusionRuntime.load(bundle, precision, "cpu", speculation="auto") for precision in ("fp32", "int8"))) as running:
        yield running.url + "/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """At the end there must be none."""
    collected: list[str] = []
    yield collected
    assert collected == []


def texts(page: Any) -> list[str]:
    """What the drawn tokens were."""
    return list(page.evaluate("[...document.querySelectorAll('.turn:last-child .token')].map((span) => span.getAttribute('aria-label'))"))


def expected(rt: FusionRuntime, prompt: Any, **options: Any) -> list[str]:
    """The same of the runtime's."""
    signs = str.maketrans({" ": "␣", "\n": "⏎"})
    return [f"{token.text.translate(signs) or '∅'}, {token.expert}" for token in rt.stream(prompt, 128, **options)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_question_is_typed_and_its_answer_comes_coloured(chromium: Any, url: str, rt: FusionRuntime, complaints: list[str]) -> None:
    page = opened(chromium, url, complaints)
    page.wait_for_selector("#facts:not(:empty)")
    ask(page, "64+61=")
    assert texts(page) == expected(rt, user("64+61="))
    shown = page.inner_text(".figures")
    assert "tokens/s" in shown and "to the first token" in shown and "ended by stop" in shown and "speculation auto" in shown
    ask(page, "print(2)")  # the conversation goes on
    answer = rt.generate(user("64+61=")).text
    conversation = [*user("64+61="), {"role": "assistant", "content": answer}, *user("print(2)")]
    assert texts(page) == expected(rt, conversation)
    page.click("#clear")
    page.check("input[value=text]")
    ask(page, "Uppercase: bus")
    assert texts(page) == expected(rt, "Uppercase: bus")


def test_pointing_and_arrow_keys_explain_tokens(chromium: Any, url: str, rt: FusionRuntime, complaints: list[str]) -> None:
    page = opened(chromium, url, complaints)
    ask(page, "Bob has 51 nuts and gets 8. Total?")
    tokens = list(rt.stream(user("Bob has 51 nuts and gets 8. Total?"), 128, candidates=5))
    page.locator(".token").nth(2).hover()
    assert f"token 3 of {len(tokens)} · id {tokens[2].id}" in page.inner_text("#details")
    candidates = tokens[2].candidates
    assert candidates is not None
    columns = page.evaluate("[...document.querySelectorAll('.models section')].map((each) => each.querySelectorAll('li').length)")
    assert columns == [5, 5, 5]
    assert [title.lower() for title in page.locator(".models h3").all_inner_texts()] == ["router", tokens[2].expert, "fusion"]
    page.focus(".token[tabindex='0']")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert f"token 2 of {len(tokens)} " in page.inner_text("#details")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop for the Tab key


def test_settings_reach_the_server(chromium: Any, url: str, bundle: Path, rt: FusionRuntime, complaints: list[str]) -> None:
    page = opened(chromium, url, complaints)
    page.wait_for_selector("#facts:not(:empty)")
    page.focus("#lam")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#lam-value") == "1.00"
    ask(page, "Reverse the words: egg net pie")
    assert texts(page) == expected(rt, user("Reverse the words: egg net pie"), lam=1.0)
    page.locator(".token").first.hover()
    assert "did not run" in page.inner_text(".models")  # the expert
    page.select_option("#fusion", "additive")
    assert page.is_disabled("#lam")
    page.fill("#temperature", "0.8")
    page.fill("#seed", "7")
    page.select_option("#expert", "code")
    page.click("#clear")
    ask(page, "64+61=")
    options: dict[str, Any] = {"fusion": "additive", "temperature": 0.8, "seed": 7, "expert": "code"}
    assert texts(page) == expected(rt, user("64+61="), **options)
    page.select_option("#drafts", "off")
    page.click("#clear")
    ask(page, "64+61=")
    assert texts(page) == expected(rt, user("64+61="), **options)
    assert "speculation off" in page.inner_text(".figures") and "drafts accepted" not in page.inner_text(".figures")
    page.select_option("#precision", "int8")
    page.click("#clear")
    ask(page, "64+61=")
    with FusionRuntime.load(bundle, "int8", "cpu") as rounded:
        assert texts(page) == expected(rounded, user("64+61="), **options)
    page.fill("#temperature", "5")
    page.fill("#prompt", "64+61=")
    page.press("#prompt", "Enter")
    assert page.locator(".turn").count() == 1  # refused by the field, before the server


def test_an_answer_can_be_stopped(chromium: Any, bundle: Path, complaints: list[str]) -> None:
    from tests.support.server import served, wait_until

    with served(FusionRuntime.load(bundle, "fp32", "cpu")) as running:
        page = opened(chromium, running.url + "/", complaints)
        page.fill("#max_tokens", "900")
        page.fill("#temperature", "2")
        page.check("input[value=text]")
        page.fill("#prompt", "Join with dashes:")
        page.route(
            "**/v1/completions",
            lambda route: route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True})),
        )
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(".token")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:not([disabled])")
        wait_until(lambda: running.idle)
        assert 0 < page.locator(".token").count() < 900
        assert "ended by stopped" in page.inner_text(".figures")
        page.unroute("**/v1/completions")


def test_a_new_conversation_forgets_an_answer_that_still_comes(chromium: Any, bundle: Path, complaints: list[str]) -> None:
    from tests.support.server import served, wait_until

    bodies: list[dict[str, Any]] = []

    def endless(route: Any) -> None:
        bodies.append(json.loads(route.request.post_data))
        route.continue_(post_data=json.dumps(bodies[-1] | {"ignore_eos": len(bodies) == 1}))

    with served(FusionRuntime.load(bundle, "fp32", "cpu")) as running:
        page = opened(chromium, running.url + "/", complaints)
        page.route("**/v1/chat/completions", endless)
        page.fill("#max_tokens", "900")
        page.fill("#prompt", "64+61=")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".token")
        page.click("#clear")
        page.wait_for_selector("#send:not([disabled])")
        wait_until(lambda: running.idle)
        assert page.locator(".turn").count() == 0 and page.inner_text("#details") == ""
        ask(page, "print(2)")
        assert bodies[-1]["messages"] == user("print(2)")
        page.unroute("**/v1/chat/completions")


def test_an_answer_is_shared_as_a_page_of_its_own(chromium: Any, url: str, complaints: list[str], tmp_path: Path) -> None:
    page = opened(chromium, url, complaints)
    ask(page, "64+61=")
    with page.expect_download() as download:
        page.click(".share")
    download.value.save_as(tmp_path / "answer.html")
    shared = opened(chromium, (tmp_path / "answer.html").as_uri(), complaints)
    assert shared.locator(".token").all_inner_texts() == page.locator(".token").all_inner_texts()
    assert shared.inner_text(".prompt") == "64+61=" and answer_in((tmp_path / "answer.html").read_text())["model"] == "tiny"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phones_see_all_of_it(chromium: Any, url: str, complaints: list[str], scheme: str) -> None:
    page = opened(chromium, url, complaints, color_scheme=scheme, **PHONE)
    ask(page, "Bob has 51 nuts and gets 8. Total?")
    page.locator(".token").nth(1).tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "Routing" in page.inner_text("#details")
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.click(".theme")  # light
    page.click(".theme")  # dark
    assert (page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == dark) == (scheme == "dark")


def test_a_key_is_asked_for(chromium: Any, bundle: Path) -> None:
    from tests.support.server import served

    with served(FusionRuntime.load(bundle, "fp32", "cpu"), api_key="secret") as running:
        page = opened(chromium, running.url + "/", [])  # the console tells the 401
        page.wait_for_selector("#key")
        assert "API key" in page.inner_text("#error")
        page.fill("#key", "secret")
        ask(page, "64+61=")
        assert page.locator(".token").count() > 0 and page.inner_text("#error") == ""


def test_hostile_texts_are_only_shown(chromium: Any, complaints: list[str], tmp_path: Path) -> None:
    ranked = [{"id": 1, "text": HOSTILE, "logprob": -0.1}]
    token = {
        "id": 1,
        "text": HOSTILE,
        "expert": HOSTILE,
        "routing": [0.5],
        "candidates": {"router": ranked, "expert": ranked, "fused": ranked},
    }
    answer = {"model": HOSTILE, "facts": {HOSTILE: HOSTILE}, "experts": [HOSTILE], "router": HOSTILE, "prompt": HOSTILE, "tokens": [token]}
    file = tmp_path / "answer.html"
    file.write_text(answer_page(answer | {"finish_reason": HOSTILE}), encoding="utf-8")
    page = opened(chromium, file.as_uri(), complaints)
    assert page.inner_text(".token") == HOSTILE and page.inner_text(".prompt") == HOSTILE
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
