"""Files that prove whole: what was written comes back, and every other file is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fusionroute.calibration import checksummed_file
from fusionroute.runtime.errors import InputError

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b/c": np.zeros(0, np.int64), "d": np.array([1.5, -np.inf])}
WORDS = {"who": "somebody", "what": "Größe"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "below" / "file.safetensors"
    checksummed_file.write(path, "thing", TENSORS, WORDS)
    return path


def test_there_and_back(file: Path) -> None:
    tensors, words = checksummed_file.read(file, "thing")
    assert words == WORDS and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing half-written is left"


def test_every_changed_byte_shows(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError) as caught:
            checksummed_file.read(file, "thing")
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    file.write_bytes(whole)
    checksummed_file.read(file, "thing")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_files_cut_off(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"The thing .* cannot be read .*; make it again"):
        checksummed_file.read(file, "thing")


def test_files_of_another_kind(file: Path) -> None:
    with pytest.raises(InputError, match=r"is no other thing: name a file that was written as one"):
        checksummed_file.read(file, "other thing")
    save_file({"a": np.zeros(3)}, file)
    with pytest.raises(InputError, match="is no thing"):
        checksummed_file.read(file, "thing")
    save_file({"a": np.zeros(3)}, file, {"kind": "thing", "format": "0"})
    with pytest.raises(InputError, match="is a thing of format 0, this version reads 1: make it again"):
        checksummed_file.read(file, "thing")
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        checksummed_file.read(file, "thing")


def test_where_nothing_can_be_written(file: Path) -> None:
    with pytest.raises(InputError, match=r"The thing cannot be written to .*; choose a folder with room"):
        checksummed_file.write(file / "not a folder" / "x", "thing", TENSORS, WORDS)
    before = file.read_bytes()
    with pytest.raises(TypeError):
        checksummed_file.write(file, "thing", TENSORS, {"who": 5})  # type: ignore[dict-item]
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
