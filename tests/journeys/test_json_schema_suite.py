"""Texts by schemas of the public JSON-Schema-Test-Suite, asked for over HTTP: all are valid by `jsonschema`.

Slow. The suite comes with jsonschema's source package, which pip downloads; FUSIONROUTE_JSON_SCHEMA_SUITE names another.
`-s` shows which schemas were refused, and why.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from fusionroute.runtime import FusionRuntime
from tests.support.exporting import export_shipped
from tests.support.server import MODEL, Served, served

pytestmark = pytest.mark.slow
DRAFTS = {"draft2020-12": "https://json-schema.org/draft/2020-12/schema", "draft7": "http://json-schema.org/draft-07/schema#"}
TRIES = 8  # seeds: a sampled text may go on to its limit, and by a schema that names itself it mostly does
MOST_UNENDED = 0.05  # of the schemas that are followed: their texts show nothing


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds `tests/`."""
    if named := os.environ.get("FUSIONROUTE_JSON_SCHEMA_SUITE"):
        return Path(named)
    folder = tmp_path_factory.mktemp("suite")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "jsonschema",
        "-d",
        str(folder),
        "jsonschema==4.26.0",
    ]
    if subprocess.run(download, check=False).returncode:
        pytest.skip("no JSON-Schema-Test-Suite: set FUSIONROUTE_JSON_SCHEMA_SUITE to its folder")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/json"))


@pytest.fixture(scope="module")
def schemas(suite: Path) -> dict[str, dict[str, Any]]:
    """All schemas of both drafts by what they are called, each with its draft; over HTTP a schema is an object, no Boolean."""
    named = {}
    for draft, uri in DRAFTS.items():
        for file in sorted((suite / "tests" / draft).glob("*.json")):
            for group in json.loads(file.read_text(encoding="utf-8")):
                if isinstance(group["schema"], dict):
                    named[f"{draft}/{file.stem}: {group['description']}"] = {"$schema": uri} | group["schema"]
    return named


@pytest.fixture(scope="module", params=["gemma2", "llama3"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    bundle = export_shipped(tmp_path_factory.mktemp("bundle") / request.param, request.param, ("int8",))
    with served(FusionRuntime.load(bundle), sessions=1) as running:
        yield running


def test_texts_by_every_schema_are_valid(server: Served, schemas: dict[str, dict[str, Any]]) -> None:
    refused: dict[str, list[str]] = {}
    counts, unended = Counter[str](), []
    for name, schema in schemas.items():
        for seed in range(TRIES):
            format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"model": MODEL, "prompt": "12+30=", "temperature": 1.0, "seed": seed, "max_tokens": 400, "response_format": format}
            answer = httpx.post(server.url + "/v1/completions", json=body, timeout=None)  # a busy machine takes long
            if answer.status_code == 400:
                sentence = answer.json()["error"]["message"]
                assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 400, (name, sentence)
                refused.setdefault(sentence, []).append(name)
                break
            assert answer.status_code == 200, (name, answer.text)
            choice = answer.json()["choices"][0]
            if choice["finish_reason"] == "stop":
                content = json.loads(choice["text"])
                validator = jsonschema.validators.validator_for(schema)(schema)
                assert validator.is_valid(content), (name, schema, choice["text"])
                counts["valid"] += 1
                break
            counts["cut"] += 1
        else:
            unended.append(name)
    print(f"\n{counts['valid']} valid, {counts['cut']} texts were cut, {unended} never ended, {sum(map(len, refused.values()))} refused:")
    for sentence, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):>4} {sentence} ({names[0]})")
    assert counts["valid"] >= 200 and len(unended) <= MOST_UNENDED * counts["valid"]
