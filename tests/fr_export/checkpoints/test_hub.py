"""Checkpoints of the hub: what is no id, and what is said where the hub cannot be reached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fusionroute.fr_export.checkpoints import hub
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.errors import InputError, UnavailableError


@pytest.mark.parametrize("source", ["some-owner/some-model", "meta-llama/Llama-3.2-1B"])
def test_hub_ids_offline(monkeypatch: pytest.MonkeyPatch, source: str, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UnavailableError, match=f"There is no folder {source}, and the hub cannot be reached .*: go online once, or name a local"
    ):
        Checkpoint.open("router", source, FAMILIES["llama3"])


def failing(error: Exception) -> Callable[..., Any]:
    def download(*_: object, **__: object) -> None:
        raise error

    return download


def test_other_troubles_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    network = type("ConnectError", (Exception,), {"__module__": "httpx"})
    for error in (network("no route"), ConnectionError(), TimeoutError(), OSError("proxy")):
        monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error))
        with pytest.raises(UnavailableError, match="cannot be reached"):
            hub.locate("owner/name")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(full))
    with pytest.raises(OSError, match="No space left on device"):
        hub.locate("owner/name")


@pytest.mark.parametrize("source", ["a--b/c", "-/-", "owner/na..me"])
def test_names_that_are_no_hub_id(source: str) -> None:
    with pytest.raises(InputError, match=r"There is no folder .* no hub id such as owner/name"):
        hub.locate(source)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "../a", "/no/where", "a/b/c", ""])
def test_folders_that_do_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()  # so that a/b/c is a path with a slip, not a folder of the hub's repository a/b
    with pytest.raises(InputError, match=r"does not exist \(and is no hub id such as owner/name\)"):
        hub.locate(source)


FILES = [
    "README.md", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-q8_0-00001-of-00002.gguf", "m-q8_0-00002-of-00002.gguf", "mmproj-m.gguf",
    "sub/n-F16.gguf",
]  # fmt: skip


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], None]:
    """Lets the hub have one repository with these files; a download brings those that the patterns allow."""

    def serve(names: list[str]) -> None:
        def snapshot_download(_: str, *, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None) -> str:
            for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: names)

    return serve


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("owner/name:m-Q4_K_S.gguf", "m-Q4_K_S.gguf"),
        ("owner/name:Q4_K_M", "m-Q4_K_M.gguf"),
        ("owner/name:q4_k_m", "m-Q4_K_M.gguf"),
        ("owner/name:Q8_0", "m-q8_0-00001-of-00002.gguf"),
        ("owner/name:sub/n-F16.gguf", "sub/n-F16.gguf"),
    ],
)
def test_a_gguf_of_a_repository_is_named_by_its_file_or_kind(
    source: str, file: str, repository: Callable[[list[str]], None], tmp_path: Path
) -> None:
    repository(FILES)
    assert hub.locate(source) == tmp_path / file
    parts = [name for name in FILES if "q8_0" in name] if "q8_0" in file else [file]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.gguf")) == parts, "no other model is downloaded"


def test_a_repository_of_gguf_models_without_a_choice(repository: Callable[[list[str]], None], tmp_path: Path) -> None:
    repository(FILES)
    with pytest.raises(InputError, match=r"owner/name holds 4 GGUF models \(m-Q4_K_M.gguf, .*\): name one, such as owner/name:m-Q4_K_M"):
        hub.locate("owner/name")
    with pytest.raises(InputError, match=r"has no GGUF models 'Q4_K'; name one of its files \(m-Q4_K_M.gguf, m-Q4_K_S.gguf, "):
        hub.locate("owner/name:Q4_K")
    repository(["config.json", "mmproj-m.gguf", "only.gguf"])
    assert hub.locate("owner/name") == tmp_path / "only.gguf"


def test_a_repository_of_pickles_names_both_commands(repository: Callable[[list[str]], None]) -> None:
    repository(["config.json", "pytorch_model.bin"])
    with pytest.raises(InputError, match=r"holds pickled weights .* \(hf download owner/name --local-dir name\) and convert .*'name'"):
        hub.locate("owner/name")
