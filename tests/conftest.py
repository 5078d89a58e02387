"""Fixtures that every test gets."""

import logging
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches go to a folder of this run, which all its tests share, and not to the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Exports of equal architectures share one trace, which takes most of a small export's time."""
    if find_spec("torch") is None:  # tests/runtime alone
        yield
        return
    from fusionroute.fr_export.graphs import traces
    from fusionroute.fr_export.graphs.dialects import ort
    from fusionroute.fr_export.graphs.trace import architecture, trace

    graphs: dict[Any, Any] = {}

    def cached_trace(family: Any, config: Any, vocab_size: int, max_seq_len: int, dialect: Any = ort) -> Any:
        key = family.name, architecture(config, vocab_size), max_seq_len, dialect
        if key not in graphs:
            graphs[key] = trace(family, config, vocab_size, max_seq_len, dialect)
        return graphs[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces, "trace", cached_trace)
        yield


@pytest.fixture(scope="session")
def all_bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of the folders in FUSIONROUTE_BUNDLES (with colons between); else small systems, exported here."""
    root = tmp_path_factory.mktemp("bundles")
    named = [Path(name) for name in os.environ.get("FUSIONROUTE_BUNDLES", "").split(":") if name]
    if named:
        return [Path(shutil.copytree(path, root / f"{number}-{path.name}")) for number, path in enumerate(named)]
    from tests.support.exporting import export_runtime_bundles

    return export_runtime_bundles(root)


@pytest.fixture(scope="session")
def bundles(all_bundles: list[Path]) -> list[Path]:
    """Two systems of full models, and one of adapters with one base."""
    return all_bundles[:3]


@pytest.fixture
def bundle(bundles: list[Path], tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(bundles[0], tmp_path / "bundle"))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that the runtime logs."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("fusionroute"), Lines()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
