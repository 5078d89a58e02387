"""Replacing a bundle: at no moment is there none, whatever ends the process; and what stands in its way is refused."""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from fusionroute.fr_export.bundle.disk_space import check_space
from fusionroute.fr_export.bundle.staged_folder import StagedBundle, remove
from fusionroute.runtime import BundleError, FusionError, InputError, files
from fusionroute.runtime.command_errors import one_sentence
from fusionroute.runtime.manifest import Manifest
from tests.support.paths import REPOSITORY
from tests.support.staging import DEAD, contents, fill, stage

CAN_EXCHANGE = sys.platform == "linux"


def text_of(out: Path) -> str:
    return (out / "tokenizer.json").read_text()


@pytest.mark.skipif(not CAN_EXCHANGE, reason="the system has no exchange")
def test_a_reader_finds_a_bundle_at_every_moment(tmp_path: Path) -> None:
    out, stop, missing = tmp_path / "bundle", threading.Event(), []
    stage(out, "0")

    def read() -> None:
        while not stop.is_set():
            if not (out / "manifest.json").exists():
                missing.append(time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 101):
        stage(out, str(number), force=True)
    stop.set()
    reader.join()
    assert missing == [] and text_of(out) == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


FOREVER = """
import sys
from pathlib import Path
from tests.support.staging import stage
from fusionroute.runtime import files
if sys.argv[2] == "renames":
    files.exchange = lambda first, second: False
print("begun", flush=True)
for number in range(1_000_000):
    stage(Path(sys.argv[1]), str(number), force=True)
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_leave_a_whole_bundle(tmp_path: Path, way: str, kills: int) -> None:
    """A load brings it back where the kill came between two renames."""
    out = tmp_path / "bundle"
    stage(out, "first")
    for kill in range(kills):
        process = subprocess.Popen([sys.executable, "-c", FOREVER, str(out), way], cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(0.1 + 0.013 * kill)
        process.kill()
        process.communicate()
        assert way == "renames" or out.exists()
        with pytest.raises(BundleError, match="does not fit the bundle format"):  # staging's small folders are no real ones
            Manifest.read(out)
        assert set(contents(out)) == {"manifest.json", "graphs/a.onnx", "tokenizer.json"}
    stage(out, "last", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and text_of(out) == "last"


def test_a_load_brings_an_old_bundle_back(tmp_path: Path) -> None:
    old = tmp_path / f".bundle.replaced-{DEAD}"
    fill(old, "old")
    files.bring_back(tmp_path / "bundle")
    assert text_of(tmp_path / "bundle") == "old" and not old.exists()
    fill(old, "older")
    files.bring_back(tmp_path / "bundle")
    assert text_of(tmp_path / "bundle") == "old", "it stands in nobody's place"


def test_a_load_does_not_interfere_with_a_process_that_runs(tmp_path: Path) -> None:
    old = tmp_path / f".bundle.replaced-{os.getpid()}"
    fill(old, "old")
    lock = files.lock_file(tmp_path / f".bundle.lock-{os.getpid()}")
    assert lock is not None
    with lock:
        files.bring_back(tmp_path / "bundle")
    assert old.exists() and not (tmp_path / "bundle").exists()


def into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "change", [into_fifo, into_zeros, lambda path: path.write_text("[" * 200_000), lambda path: path.write_text("9" * 9999)]
)
def test_an_old_manifest_that_is_none(tmp_path: Path, change: object) -> None:
    out = tmp_path / "bundle"
    stage(out)
    assert callable(change)
    change(out / "manifest.json")
    with pytest.raises(InputError) as caught:
        stage(out, force=True)
    assert str(caught.value) == f"{out} exists and is no bundle, so it is not replaced: name another folder with --out."


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_an_old_manifest_that_cannot_be_read_now_is_not_called_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    out = tmp_path / "bundle"
    stage(out)

    def fails(folder: Path, name: str, most: int) -> bytes:
        raise OSError(number, os.strerror(number), str(folder / name))

    monkeypatch.setattr("fusionroute.fr_export.bundle.staged_folder.read_regular", fails)
    with pytest.raises(InputError) as caught:
        stage(out, force=True)
    assert str(caught.value) == (
        f"{out / 'manifest.json'} cannot be read now ({os.strerror(number)}), so {out} is not replaced: "
        "mend that, or name another folder with --out."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    with pytest.raises(InputError) as caught, StagedBundle(out, True):
        pytest.fail("work began")
    assert str(caught.value) == f"{out} is a mount point, which no folder can replace: name a folder below it with --out."


def test_what_cannot_be_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, lines = tmp_path / "old", list[str]()
    fill(folder, "old")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fusionroute").addHandler(handler)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        remove(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        logging.getLogger("fusionroute").removeHandler(handler)
    assert lines == [f"{folder} cannot be removed (Too many open files): remove it by hand, or export to the same place again."]


ENDS = {"SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("name", ENDS)
def test_signals_leave_nothing_half_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit) as ended, one_sentence("export"), StagedBundle(tmp_path / "bundle", False) as staging:
        fill(staging.folder, "half")
        os.kill(os.getpid(), getattr(signal, name))
    assert ended.value.code == ENDS[name] and list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_sentence("export"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_in_a_library_that_makes_another_error_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as ended, one_sentence("export", left="nothing was written"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise ValueError("a tensor without a device") from None
    assert ended.value.exit_code == 1 and capsys.readouterr().err == "error: Interrupted; nothing was written.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_small_sizes_are_no_zeros(tmp_path: Path) -> None:
    with pytest.raises(FusionError) as caught:
        check_space(1_400_000, 512, tmp_path / "bundle")
    assert str(caught.value).startswith(f"The bundle needs about 1.4 MB, but {tmp_path} has 512 B free: make room")
