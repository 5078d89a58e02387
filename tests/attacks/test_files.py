"""Files of a bundle that are other than they seem: links, devices, changes behind the back of who checks them."""

import mmap
import os
import random
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime import BundleError, FusionRuntime, cache, files
from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.providers import PROVIDERS, Opener, no_options
from fusionroute.runtime.bundle import FACTORS, Bundle
from fusionroute.runtime.finite_weights import check_finite
from fusionroute.runtime.integrity import checked, note
from fusionroute.runtime.manifest import Manifest
from tests.support.bundles import refusal
from tests.support.waiting import until

LINK = "it is a link, and links are not followed: cp -rL copies what they lead to"
SPECIAL = "it is no regular file"
AGAIN = "copy or export the bundle again."


def load(bundle: Path, **options: Any) -> FusionRuntime:
    return FusionRuntime.load(bundle, "fp32", "cpu", threads=1, **options)


def router_weights(bundle: Path) -> Path:
    return bundle / "graphs" / "weights" / "router.bin"


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "graphs/weights/router.bin", "graphs", "graphs/weights"])
def test_a_link_is_not_followed(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    sentence = refusal(bundle)
    assert sentence.startswith(f"{bundle / name}") and sentence.endswith(f" cannot be read ({LINK}); {AGAIN}")


def test_factors_are_not_read_through_a_link_that_came_later(all_bundles: list[Path], tmp_path: Path) -> None:
    opened = Bundle.open(shutil.copytree(all_bundles[2], tmp_path / "bundle"))
    name = next(name for name in opened.manifest.files if name.startswith(FACTORS))
    (opened.folder / name).rename(tmp_path / "elsewhere")
    (opened.folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError) as caught:
        check_finite(opened)
    assert str(caught.value) == f"{opened.folder / name} cannot be read ({LINK}); {AGAIN}"


def test_a_link_to_a_device_is_not_read(bundle: Path) -> None:
    """/dev/zero never ends: who reads it takes all memory."""
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").symlink_to("/dev/zero")
    assert refusal(bundle) == f"{bundle / 'manifest.json'} cannot be read ({LINK}); {AGAIN}"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "graphs/weights/router.bin"])
def test_nobody_waits_for_a_fifo_or_a_socket(bundle: Path, name: str, make: Callable[[Path], None]) -> None:
    (bundle / name).unlink()
    make(bundle / name)
    assert refusal(bundle) == f"{bundle / name} cannot be read ({SPECIAL}); {AGAIN}"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc"), lambda path: path.symlink_to("/nowhere")])
def test_what_the_manifest_does_not_name_is_told_by_verify(bundle: Path, make: Callable[[Path], None]) -> None:
    make(bundle / "graphs" / "extra")
    with pytest.raises(BundleError) as caught:
        load(bundle, verify=True)
    expected = "does not belong to the bundle (the manifest does not name it); remove it or export the bundle again."
    assert str(caught.value) == f"{bundle / 'graphs' / 'extra'} {expected}"


@pytest.mark.parametrize("length", [300, 5000])
def test_names_that_are_too_long_for_the_disk(bundle: Path, length: int) -> None:
    manifest = Manifest.read(bundle)
    manifest.model_copy(update={"files": manifest.files | {"a" * length: manifest.files["tokenizer.json"]}}).write(bundle)
    assert refusal(bundle) == f"{bundle / ('a' * length)} cannot be read (File name too long); {AGAIN}"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("verify", [False, True])
def test_weights_that_are_swapped_while_they_load(bundle: Path, monkeypatch: pytest.MonkeyPatch, back: bool, verify: bool) -> None:
    """After the hash, before ONNX Runtime opens them; and put back before anybody could look again."""
    weights, good = router_weights(bundle), bundle.parent / "good"
    evil = bundle.parent / "evil"
    evil.write_bytes(bytes(weights.stat().st_size))
    opened = ort.open_session

    def swapping(*arguments: Any, **options: Any) -> Any:
        swap = weights.exists() and not good.exists()
        if swap:
            weights.rename(good)
            shutil.copy(evil, weights)
        session = opened(*arguments, **options)
        if swap and back:
            good.replace(weights)
        return session

    monkeypatch.setattr(ort, "open_session", swapping)
    with pytest.raises(BundleError) as caught:
        load(bundle, verify=verify)
    assert str(caught.value) in {
        f"{weights} was changed since the bundle was opened; load the bundle again.",
        f"{bundle / 'graphs'} was changed while it was read; load the bundle again.",
    }


def open_on_provider(bundle: Path) -> Any:
    """As a GPU's provider is given a graph; the CPU's stands in for it."""
    provider = replace(PROVIDERS["ort-tensorrt"], name="CPUExecutionProvider", extra="cpu", options=no_options, memory="cpu", fallback=None)
    return Opener(provider).open(Bundle.open(bundle), "graphs/router.ort-cpu.fp32.onnx")


@pytest.mark.parametrize("open_graph", [load, open_on_provider])
def test_a_graph_that_is_swapped_after_its_check(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, open_graph: Callable[[Path], object]
) -> None:
    """What is loaded are the bytes that were hashed; and the swap is told."""
    graph = bundle / "graphs" / "router.ort-cpu.fp32.onnx"
    opened, contents, good = ort.open_session, [], graph.read_bytes()

    def swapping(onnxruntime: Any, content: Any, *arguments: Any, **options: Any) -> Any:
        contents.append(content)
        if content == good:  # not another model's, nor the one with which providers are tried
            graph.write_bytes(b"evil")
        return opened(onnxruntime, content, *arguments, **options)

    monkeypatch.setattr(ort, "open_session", swapping)
    with pytest.raises(BundleError, match=r"was changed since the bundle was opened; load the bundle again\.$"):
        open_graph(bundle)
    assert good in contents and b"evil" not in contents


def unnoticed_flips(bundle: Path, count: int, seed: int) -> list[tuple[str, int]]:
    """Flip a random bit of all bytes of all files, so often; returns where a default first load noticed nothing."""
    chance, sizes = random.Random(seed), {name: file.bytes for name, file in Manifest.read(bundle).files.items()}
    unnoticed = []
    for name in chance.choices(list(sizes), list(sizes.values()), k=count):
        path, place = bundle / name, chance.randrange(sizes[name])
        good = path.read_bytes()
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << chance.randrange(8)]) + good[place + 1 :])
        try:
            load(bundle).close()
            unnoticed.append((name, place))
        except BundleError:
            pass
        path.write_bytes(good)
    return unnoticed


def test_flipped_bits_are_noticed_by_the_first_load(bundle: Path) -> None:
    assert unnoticed_flips(bundle, 20, seed=1) == []


@pytest.mark.slow
def test_200_flipped_bits_are_noticed_by_the_first_load(bundle: Path) -> None:
    assert unnoticed_flips(bundle, 200, seed=2) == []


def test_a_file_is_hashed_once_until_it_is_another(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that keeps the size and puts the time back is one too."""
    weights = router_weights(bundle)
    monkeypatch.setattr("fusionroute.runtime.integrity.SETTLED", 0)
    hashed: list[str] = []
    check = Bundle.check

    def noting(self: Bundle, name: str, *arguments: Any) -> None:
        hashed.append(name)
        check(self, name, *arguments)

    monkeypatch.setattr(Bundle, "check", noting)
    load(bundle).close()
    assert set(hashed) == set(Manifest.read(bundle).files)
    hashed.clear()
    load(bundle).close()
    assert hashed == [], "but for what is loaded from memory"
    load(bundle, verify=True).close()
    assert set(hashed) == set(Manifest.read(bundle).files), "verify hashes everything always"
    times, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert refusal(bundle).startswith(f"{weights} was changed after the export")


@pytest.mark.parametrize(("cores", "before"), [(1, 0), (2, 0), (3, 0), (5, 2)])
def test_hashing_takes_the_cores_that_loading_leaves(bundle: Path, monkeypatch: pytest.MonkeyPatch, cores: int, before: int) -> None:
    """There are 3 models, each of which keeps a core busy until all are loaded."""
    monkeypatch.setattr("fusionroute.runtime.integrity.cores", lambda: cores)
    opened, lock, begun = Bundle.open(bundle), threading.Semaphore(0), list[str]()

    def check(name: str, *_: object) -> None:
        begun.append(name)
        lock.acquire()

    monkeypatch.setattr(opened, "check", check)
    assert len(opened.manifest.models) == 3
    with checked(opened, False, None) as models_are_loaded:
        until(lambda: len(begun) == before)
        models_are_loaded()
        until(lambda: len(begun) == cores)
        lock.release(len(opened.manifest.files))
    assert sorted(begun) == sorted(opened.manifest.files), "each once"


def test_files_that_are_longer_than_what_is_mapped_of_them_at_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionroute.runtime.bundle.WINDOW", mmap.ALLOCATIONGRANULARITY)
    weights = router_weights(bundle)
    content = weights.read_bytes()
    assert len(content) > 2 * mmap.ALLOCATIONGRANULARITY
    Bundle.open(bundle).verify()
    for place in (0, mmap.ALLOCATIONGRANULARITY, len(content) - 1):
        weights.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BundleError, match="its BLAKE3 differs"):
            Bundle.open(bundle).check(router_weights(bundle).relative_to(bundle).as_posix(), every=False)


def test_a_file_that_is_cut_off_while_it_is_opened_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, weights = Bundle.open(bundle), router_weights(bundle)
    weights.write_bytes(b"")
    monkeypatch.setattr(Bundle, "_check_unchanged", lambda *_: None)
    with pytest.raises(BundleError, match="cannot be read"):
        opened.check(weights.relative_to(bundle).as_posix())


@pytest.mark.parametrize("damage", [b"", b"[" * 100_000, b'{"sha256": "0", "content": {}}'])
def test_what_is_remembered_is_checked_itself(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    monkeypatch.setattr("fusionroute.runtime.integrity.SETTLED", 0)
    load(bundle).close()
    noted = note(Bundle.open(bundle))
    assert cache.read_checked(noted)
    noted.write_bytes(damage)
    weights = router_weights(bundle)
    weights.write_bytes(bytes(weights.stat().st_size))
    assert refusal(bundle).startswith(f"{weights} was changed after the export")
    assert noted.parent == files.cache_folder() / "verified"
