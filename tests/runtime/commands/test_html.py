"""`generate --html`: what the page tells is what the runtime said."""

from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.commands import Command
from tests.support.pages import answer_in


def test_a_page_tells_what_the_runtime_said(bundles: list[Path], tmp_path: Path, command: Command) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 2, "lam": 0.25}
    with FusionRuntime.load(bundles[0], "fp32", "cpu") as rt:
        tokens, experts = list(rt.stream("12+30=", 12, candidates=5, **options)), rt.expert_names
        texts = [rt.decode([id]) for id in range(rt.vocab_size)]
    page = tmp_path / "answer.html"
    arguments = ["--prompt", "12+30=", "--max-new-tokens", 12, "--temperature", 0.9, "--seed", 2, "--lambda", 0.25, "--precision", "fp32"]
    ended = command("generate", bundles[0], *arguments, "--device", "cpu", "--html", page)
    assert (ended.status, ended.out) == (0, "".join(token.text for token in tokens) + "\n")
    answer = answer_in(page.read_text(encoding="utf-8"))
    assert (answer["prompt"], answer["experts"], answer["router"]) == ("12+30=", experts, "router")
    assert answer["facts"] == {"precision": "fp32", "fusion": "weighted", "λ": "0.25", "speculation": "off"}
    assert [(told["id"], told["text"], told["expert"]) for told in answer["tokens"]] == [(t.id, t.text, t.expert) for t in tokens]
    for told, token in zip(answer["tokens"], tokens, strict=True):
        assert told["routing"] == pytest.approx(token.routing.tolist(), abs=1e-5)
        assert token.candidates is not None
        for model, ranked in token.candidates._asdict().items():
            assert [each["id"] for each in told["candidates"][model]] == [id for id, _ in ranked]
            assert [each["logprob"] for each in told["candidates"][model]] == pytest.approx([value for _, value in ranked], abs=1e-5)
            assert all(each["text"] == texts[each["id"]] for each in told["candidates"][model] if texts[each["id"]])
    assert 0 < answer["first_seconds"] < 60 and answer["tokens_per_second"] > 0
    assert (answer["finish_reason"], answer["drafted"], answer["accepted"]) == ("length", 0, 0)


def test_a_page_without_a_folder_is_refused_before_anything_is_loaded(bundles: list[Path], tmp_path: Path, command: Command) -> None:
    page = tmp_path / "nowhere" / "answer.html"
    ended = command("generate", bundles[0], "--prompt", "1", "--html", page)
    assert ended.status == 1 and ended.err == f"error: {page} cannot be written, since {page.parent} is no folder: make it first.\n"
