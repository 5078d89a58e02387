"""Fixtures that every test gets."""

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
