"""Inference sessions on ONNX Runtime's CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.runtime.backends import ort
from fusionroute.runtime.backends.signature import of_fusion
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.machine import cores

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Variant


class CpuSessions:
    """Opens the graphs of one variant of a bundle. `threads` None: one for each core."""

    def __init__(self, bundle: Bundle, variant: Variant, threads: int | None):
        """Raises UnavailableError without onnxruntime."""
        self._ort = ort.package("cpu")
        self._bundle, self._variant, self._threads = bundle, variant, threads or cores()

    def model(self, name: str, graph: str, share: bool = False) -> Any:
        """A session of a model's graph, a path in the bundle; `share`: with weights that processes share, see `prepacked_weights`.

        Raises BundleError for a graph that ONNX Runtime cannot load, UnavailableError where no shared weights can be
        written.
        """
        if not share:
            return self._of_bundle(name, graph, self._threads)
        from fusionroute.runtime.backends.prepacked_weights import packed  # here: most never share weights

        def write(entries: dict[str, str], out: Path) -> Any:
            return self._of_bundle(name, graph, 1, entries, out)

        size = self._variant.weight_bytes.get(name, 0)
        folder, content = packed(self._bundle, graph, self._variant.precision, size, self._ort.__version__, write)
        return self._opened(name, folder, content, str(folder), self._threads)

    def fusion(self) -> Any:
        """A session of the fusion graph. Raises BundleError."""
        # one pass over a row is too short for threads
        session = self._of_bundle("the fusion graph", self._variant.fusion_graph, 1)
        ort.check(session, of_fusion(self._bundle.manifest.vocab_size), self._bundle, self._variant.fusion_graph)
        return session

    def run_options(self) -> Any:
        """Options of the runs of one cache, which stop when their `terminate` is set."""
        options = self._ort.RunOptions()
        # 1.32 reads it at every run; without it that costs an exception, 40 µs
        options.add_run_config_entry("gpu_graph_id", "0")
        return options

    def _of_bundle(self, name: str, graph: str, threads: int, entries: dict[str, str] | None = None, out: Path | None = None) -> Any:
        with self._bundle.graph(graph) as (content, weights):
            return self._opened(name, self._bundle.folder / graph, content, weights, threads, entries, out)

    def _opened(
        self, name: str, path: Path, content: bytes, weights: str, threads: int,
        entries: dict[str, str] | None = None, out: Path | None = None,
    ) -> Any:  # fmt: skip
        options = ort.settings(self._ort, threads)
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        if out is not None:
            options.optimized_model_filepath = str(out)
        try:
            return ort.open_session(self._ort, content, options, weights, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no public base class for its errors
            raise ort.cannot_load(name, path, self._ort.__version__, error) from error
