"""Builds of one bundle at once, and builds that fail: the manifest and the engines always belong together.

The library is simulated.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.manifest import Engines, Manifest
from fusionroute.runtime.tensorrt import engines
from fusionroute.runtime.tensorrt.engines import rebuild
from tests.support.simulated.bundles import write_bundle
from tests.support.simulated.install import simulated
from tests.support.simulated.machine import Machine


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A bundle of two precisions without engines."""
    folder = write_bundle(tmp_path / "bundle", experts=1)
    manifest = Manifest.read(folder)
    variants = [manifest.variants[0].model_copy(update={"engines": [], "precision": precision}) for precision in ("fp32", "fp16")]
    files = {path: file for path, file in manifest.files.items() if not path.startswith("engines/")}
    manifest.model_copy(update={"variants": variants, "files": files}).write(folder)
    for path in (folder / "engines").iterdir():
        path.unlink()
    with simulated(Machine()):
        yield folder


class Builder:
    """Stands in for `build`: writes a new number into every engine. `during` is called before each is written."""

    def __init__(self) -> None:
        self.count = self.running = self.most_running = 0
        self.during: Any = lambda: None

    def __call__(self, graph: Path, content: bytes, engine: Path, *_: object) -> None:
        assert graph.read_bytes() == content, "beside its weights, however its folder is reached"
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            self.during()
            self.count += 1
            engine.write_bytes(b"engine %d" % self.count)
        finally:
            self.running -= 1


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr(engines, "build", builder)
    return builder


def build(folder: Path, manifest: Manifest, number: int) -> Manifest:
    """Rebuild one variant of a manifest that was read before."""
    return rebuild(folder, [manifest.variants[number]], manifest, "rtx", (86,), None, lambda _: lambda _: None)


def built(folder: Path) -> list[list[Engines]]:
    """The engines of every variant, after checking that all files are those of the manifest."""
    Bundle.open(folder).verify()
    return [variant.engines for variant in Manifest.read(folder).variants]


def test_a_build_adds_to_what_another_has_written_meanwhile(own: Path, builder: Builder) -> None:
    before = Manifest.read(own)
    build(own, before, 0)
    both = build(own, before, 1)
    assert [len(each) for each in built(own)] == [1, 1]
    assert both == Manifest.read(own)


def test_builds_of_one_bundle_wait_for_one_another(own: Path, builder: Builder) -> None:
    """The second begins while the first is under way: it has the time to write the same files, and must not."""
    manifest = Manifest.read(own)
    second = threading.Thread(target=build, args=(own, manifest, 0))

    def meanwhile() -> None:
        if not builder.count:
            second.start()
            second.join(0.5)

    builder.during = meanwhile
    build(own, manifest, 0)
    second.join(60)
    assert not second.is_alive()
    assert builder.most_running == 1 and builder.count == 6
    [[engine], []] = built(own)
    assert [(own / path).read_bytes() for path in engine.engines.values()] == [b"engine 4", b"engine 5", b"engine 6"]


def test_a_build_that_fails_leaves_the_older_engines_as_they_were(own: Path, builder: Builder) -> None:
    manifest = build(own, Manifest.read(own), 0)
    files = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}

    def fails() -> None:
        if builder.count == 5:
            raise KeyboardInterrupt

    builder.during = fails
    with pytest.raises(KeyboardInterrupt):
        build(own, manifest, 0)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == files
    built(own)


def test_a_graph_that_was_changed_is_not_built(own: Path, builder: Builder) -> None:
    manifest = Manifest.read(own)
    graph = own / manifest.variants[0].graphs["router"]
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(BundleError, match=rf"^{graph} was changed after the export"):
        build(own, manifest, 0)
    assert builder.count == 0 and Manifest.read(own) == manifest


def test_what_a_killed_build_has_left_is_removed(own: Path, builder: Builder) -> None:
    left = own / "engines" / ".router.engine.0123.partial"
    left.write_bytes(b"half")
    build(own, Manifest.read(own), 0)
    assert not left.exists()
    built(own)


def test_a_variant_that_is_gone_is_named(own: Path, builder: Builder) -> None:
    before = Manifest.read(own)
    before.model_copy(update={"variants": before.variants[:1]}).write(own)
    with pytest.raises(BundleError, match=r"was replaced by one without fp16 for tensorrt: build again\.$"):
        build(own, before, 1)
