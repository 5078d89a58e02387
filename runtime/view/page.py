"""One page of HTML with an answer in it, which loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.html_page import rendered
from fusionroute.runtime.view.details import details
from fusionroute.runtime.view.recording import Recording

FOLDER = Path(__file__).parent
CANDIDATES = 5  # of each model that a page shows


def answer_of(runtime: FusionRuntime, prompt: str, recording: Recording, fusion: str | None, lam: float | None) -> dict[str, Any]:
    """What `answer.js` draws. fusion, lam: of the call, None for the runtime's."""
    stream, names = recording.stream, runtime.expert_names
    mode = fusion or runtime.fusion
    return {
        "model": runtime.bundle.folder.resolve().name,
        "facts": {
            "precision": runtime.precision,
            "fusion": mode,
            **({"λ": f"{runtime.lam if lam is None else lam:g}"} if mode == "weighted" else {}),
            "speculation": runtime.options.speculation,
        },
        "experts": names,
        "router": runtime.bundle.manifest.models[0].name,
        "prompt": prompt,
        "tokens": [details(token, runtime.tokenizer) for token in recording.tokens],
        "first_seconds": recording.first_seconds,
        "tokens_per_second": recording.tokens_per_second,
        "drafted": stream.drafted,
        "accepted": stream.accepted,
        "finish_reason": stream.finish_reason,
    }


def answer_page(answer: dict[str, Any] | None) -> str:
    """The page of an answer; of None: one that the playground puts an answer into."""
    return rendered(
        FOLDER / "answer.html.jinja",
        answer=answer,
        text="" if answer is None else "".join(token["text"] for token in answer["tokens"]),
        style=asset("answer.css"),
        script=asset("answer.js"),
    )


def asset(name: str) -> str:
    """A file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")
