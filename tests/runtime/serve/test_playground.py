"""The page at `/`, its files, and what the server tells it. tests/browser opens it."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from fusionroute.runtime import FusionRuntime
from fusionroute.runtime.serve.playground import FILES
from fusionroute.runtime.view.details import details
from fusionroute.runtime.view.page import asset
from tests.support.server import Served, events, served


def test_the_page_and_all_that_it_loads_come_from_the_server(server: Served) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:href|src)="(?!data:)([^"]+)"', page.text)
    assert sorted(loaded) == ["playground/answer.css", "playground/answer.js", "playground/playground.css", "playground/playground.js"]
    for name in loaded:
        answer = httpx.get(f"{server.url}/{name}")
        assert answer.text == asset(Path(name).name) and answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert httpx.get(server.url + "/playground/details.py").status_code == 404
    assert '<script type="application/json" id="data">null</script>' in httpx.get(server.url + "/playground/answer.html").text


def test_the_page_needs_no_key_and_its_questions_do(bundles: list[Path]) -> None:
    with served(FusionRuntime.load(bundles[0], "int8"), api_key="secret") as running:
        assert {httpx.get(running.url + path).status_code for path in FILES} == {200}
        assert httpx.get(running.url + "/v1/models").status_code == 401


def test_the_model_tells_what_the_page_shows(server: Served, rt: FusionRuntime) -> None:
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert model["fusionroute"] == {
        "experts": rt.expert_names, "router": "router", "precision": "fp32", "precisions": ["fp32"], "fusion": "weighted", "lam": 0.5,
        "speculation": "off",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_come_with_routing_and_candidates(server: Served, rt: FusionRuntime, path: str, stream: bool) -> None:
    own = {"routing": True, "candidates": 3, "lam": 0.25, "fusion": "weighted"}
    messages = [{"role": "user", "content": "12+30="}]
    body: dict[str, Any] = {"messages": messages} if "chat" in path else {"prompt": "12+30="}
    body |= {"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": stream, "fusionroute": own}
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as answer:
        if stream:
            choices = [choice for event in events(answer.iter_lines()) for choice in event["choices"]]
        else:
            answer.read()
            choices = answer.json()["choices"]
    told = [token for choice in choices for token in choice.get("fusionroute", {}).get("tokens", [])]
    expected = rt.stream(messages if "chat" in path else "12+30=", 8, candidates=3, lam=0.25)
    tokens = [details(token, rt.tokenizer) for token in expected]
    assert [token["id"] for token in told] == [token["id"] for token in tokens]
    for one, other in zip(told, tokens, strict=True):
        assert one.keys() == other.keys() and (one["text"], one["expert"]) == (other["text"], other["expert"])
        assert one["routing"] == pytest.approx(other["routing"], abs=1e-4)
        for model, ranked in other["candidates"].items():
            assert [each["text"] for each in one["candidates"][model]] == [each["text"] for each in ranked]
            assert [each["logprob"] for each in one["candidates"][model]] == pytest.approx([each["logprob"] for each in ranked], abs=1e-3)
    assert (choices[-1]["fusionroute"]["drafted"], choices[-1]["fusionroute"]["accepted"]) == (0, 0)


def test_candidates_come_with_routing_only(server: Served) -> None:
    answer = server.complete(fusionroute={"candidates": 3})
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "candidates needs routing: true."
    assert server.complete(fusionroute={"candidates": 21, "routing": True}).status_code == 400


def test_a_request_may_name_one_of_the_precisions(bundles: list[Path]) -> None:
    scores = {}
    for precision in ("fp32", "int8"):
        with FusionRuntime.load(bundles[0], precision) as alone:
            scores[precision] = next(alone.stream("12+30=", 1)).routing.tolist()
    assert scores["fp32"] != pytest.approx(scores["int8"], abs=1e-4)
    with served(*(FusionRuntime.load(bundles[0], precision) for precision in ("int8", "fp32"))) as running:
        for named, expected in ((None, "int8"), ("fp32", "fp32"), ("int8", "int8")):
            own = {"precision": named, "routing": True}
            choice = running.complete(max_tokens=1, temperature=0, fusionroute=own).json()["choices"][0]
            assert choice["fusionroute"]["tokens"][0]["routing"] == pytest.approx(scores[expected], abs=1e-5)
        refused = running.complete(fusionroute={"precision": "int4"})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == (
            "The precision 'int4' is not loaded: use int8, fp32, or start the server with it in --precision."
        )
