"""Weights that processes share: the same numbers, mapped from files that are made once, and never from half of one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from fusionroute.runtime import FusionRuntime, InputError, UnavailableError, cache
from fusionroute.runtime.backends.prepacked_weights import RECORD, WEIGHTS

PROMPT = "12+30= and more"


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where packed weights are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "fusionroute" / "packed"


def load(bundle: Path, precision: str = "int8", **options: Any) -> FusionRuntime:
    return FusionRuntime.load(bundle, precision, "cpu", threads=1, **({"share_weights": True} | options))


def weight_files(packed: Path) -> dict[Path, int]:
    """Every packed weights file and when it was written."""
    return {path: path.stat().st_mtime_ns for path in packed.glob(f"*/{WEIGHTS}")}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_numbers_are_those_of_private_weights(bundles: list[Path], packed: Path, precision: str) -> None:
    with load(bundles[0], precision, share_weights=False) as private, load(bundles[0], precision) as shared:
        ids = private.encode(PROMPT)
        for rt in (private, shared):
            assert rt.precision == precision
        for chunk in (1, 512):
            scores, expected = shared.score(ids, chunk=chunk), private.score(ids, chunk=chunk)
            assert np.array_equal(scores.logits, expected.logits) and np.array_equal(scores.routing, expected.routing)
        maps = Path("/proc/self/maps").read_text()
        files = weight_files(packed)
        assert len(files) == len(private.bundle.manifest.models)
        assert all(str(path) in maps for path in files), "not mapped"
    with load(bundles[0], precision):
        assert weight_files(packed) == files, "written again"


def noted_size(folder: Path) -> int:
    """Of the weights, as the record has it."""
    size: int = cache.read_checked(folder / RECORD)[WEIGHTS][1][2]
    return size


def test_what_is_not_whole_is_made_again(bundles: list[Path], packed: Path) -> None:
    with load(bundles[0]) as rt:
        expected = rt.generate(PROMPT, 8).token_ids
    cut, unread, gone = list(weight_files(packed))[:3]
    os.truncate(cut, 4096)
    (unread.parent / RECORD).write_text("[")
    gone.unlink()
    left = packed / ".killed.partial"
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"half")
    with load(bundles[0]) as rt:
        assert rt.generate(PROMPT, 8).token_ids == expected
    assert all(path.stat().st_size == noted_size(path.parent) for path in weight_files(packed))
    assert not left.exists()


def test_another_export_is_packed_anew(bundles: list[Path], packed: Path, tmp_path: Path) -> None:
    """Also where names and sizes are the same: a bundle whose weights were damaged may have been replaced."""
    copy = Path(shutil.copytree(bundles[0], tmp_path / "copy"))
    load(copy).close()
    first = weight_files(packed)
    for path in copy.rglob("*.bin"):
        os.utime(path, ns=(1, 1))
    load(copy).close()
    assert len(weight_files(packed)) == 2 * len(first)


class Usage(NamedTuple):
    free: int


def test_refusals_are_one_sentence_and_leave_nothing(bundles: list[Path], packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fusionroute.runtime.backends.prepacked_weights.shutil.disk_usage", lambda path: Usage(100))
        with pytest.raises(
            UnavailableError, match=r"they need some .* MB, and 0\.0 MB are free\): make room there, .* without share_weights\.$"
        ):
            load(bundles[0])
    assert [path.name for path in packed.iterdir()] == ["lock"]
    packed.joinpath("lock").unlink()
    packed.rmdir()
    packed.write_text("a file")
    with pytest.raises(UnavailableError, match="cannot be written to"):
        load(bundles[0])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda"}, "use it with device='cpu', not 'cuda'"),
        ({"precision": "fp32", "expert_memory": 1}, "expert_memory=1 does not hold the [0-9]+ bytes of one expert"),
    ]
    for options, sentence in refused:
        with pytest.raises(InputError, match=sentence):
            FusionRuntime.load(bundles[0], share_weights=True, **options)


def test_an_error_while_writing_leaves_nothing(bundles: list[Path], packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_checked", full)
    with pytest.raises(UnavailableError, match="No space left on device"):
        load(bundles[0])
    assert [path.name for path in packed.iterdir()] == ["lock"]


OTHER = """
import sys
from fusionroute import FusionRuntime
with FusionRuntime.load(sys.argv[1], "int8", threads=1, share_weights=True) as rt:
    print(rt.generate([5, 6, 7], 6).token_ids)
"""


def test_processes_that_come_at_once(bundles: list[Path], packed: Path) -> None:
    """Each model is written once, and all read the same."""
    command = [sys.executable, "-c", OTHER, str(bundles[0])]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {other.communicate(timeout=120)[0] for other in others}
    assert all(other.returncode == 0 for other in others)
    assert len(said) == 1
    assert sorted(path.name for path in packed.iterdir()) == sorted(["lock", *(path.parent.name for path in weight_files(packed))])
