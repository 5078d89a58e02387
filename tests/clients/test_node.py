"""OpenAI's client for Node.js against the README's command: every feature, and the texts are those of `generate`.

Slow, and with the system's Node.js and npm (Debian: nodejs, npm): `make test-clients`.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import FusionRuntime, Grammar
from tests.runtime.serve.test_openai_client import MESSAGES, PROMPT, SCHEMA, TOOL, short_object
from tests.support.server import MODEL
from tests.support.started import Started

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent
if shutil.which("node") is None or not (FOLDER / "node_modules").exists():
    pytest.skip("needs OpenAI's package for Node.js: make test-clients", allow_module_level=True)


def texts(rt: FusionRuntime) -> dict[str, Any]:
    """What the runtime gives for each question of the script."""

    def completed(count: int = 12, **options: Any) -> str:
        return rt.generate(PROMPT, count, **options).text

    def answered(count: int = 12, **options: Any) -> str:
        return rt.generate(MESSAGES, count, **options).text

    completion = completed()
    barred = rt.encode(PROMPT + completion)[len(rt.encode(PROMPT))]
    bias = short_object(rt)
    named = rt.generate(PROMPT, 12, lam=0.3)
    expert = rt.expert_names[-1]
    return {
        "completion": completion,
        "chat": answered(),
        "stop": {"at": completion[-1], "text": completed(stop=completion[-1])},
        "seeds": [completed(temperature=1.0, seed=seed) for seed in (7, 8)],
        "sampled": completed(temperature=0.9, seed=3, top_k=8, min_p=0.02, top_p=0.95, repetition_penalty=1.1),
        "penalties": completed(presence_penalty=0.5, frequency_penalty=0.25),
        "bias": {"bias": {str(barred): -100}, "text": completed(logit_bias={barred: -float("inf")})},
        "logprobs": rt.generate(MESSAGES, 12).logprobs,
        "schema": answered(100, grammar=Grammar.json_schema(SCHEMA)),
        "object": {"bias": bias, "text": answered(100, grammar=Grammar.json_object(), logit_bias=bias)},
        "regex": answered(grammar=Grammar.regex("[0-9]{4}")),
        "tools": rt.generate(rt.prompt_ids(MESSAGES, tools=[TOOL]), 12).text,
        "routing": {"experts": named.experts, "text": named.text},
        "pinned": {"expert": expert, "text": completed(expert=expert)},
    }


def test_every_feature(server: Started, rt: FusionRuntime) -> None:
    question = {
        "url": server.url + "/v1", "key": server.key, "model": MODEL, "prompt": PROMPT, "messages": MESSAGES, "ids": rt.encode(PROMPT),
        "schema": SCHEMA, "tool": TOOL, "texts": texts(rt),
    }  # fmt: skip
    ended = subprocess.run(
        ["node", FOLDER / "openai_client.mjs"], input=json.dumps(question), capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "errors"  # the last of them
