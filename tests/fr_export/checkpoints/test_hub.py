"""Checkpoints of the hub: what is no id, and what is said where the hub cannot be reached."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
