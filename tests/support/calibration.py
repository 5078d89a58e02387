"""For tests of calibrated precisions: statistics of a traced model, and its graph written and run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.calibration.observers import Observer
from fusionroute.calibration.record import RecordedText
from fusionroute.calibration.serving_masks import Mask
from fusionroute.fr_export.checkpoints.system import RoutingHead, System
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.dialects import ort
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import Scheme
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.precision.evidence import Evidence
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.fp32 import Fp32
from fusionroute.fr_export.precision.shared_matrices import SharedMatrices


def traced(system: System) -> Graph:
    """The router's graph."""
    return trace(system.family, system.router.config, system.vocab_size, system.max_seq_len)


def observe(graph: Graph, weights: Weights, texts: Sequence[Sequence[int]]) -> dict[str, Observer]:
    """Statistics of the input of each matrix, over every position of the texts."""
    observers: dict[str, Observer] = {}

    def see(matrix: str, _: int, x: np.ndarray) -> None:
        observers.setdefault(matrix, Observer(matrix, x.shape[-1])).see(x)

    walk = BlockwiseForward(split(graph), [np.array(text) for text in texts], *reader(graph, weights), threads=1)
    while not walk.done:
        walk.step(see)
    return observers


def known(texts: Sequence[np.ndarray]) -> Evidence:
    """Evidence of texts that the model serves at every position; it has no statistics."""
    return Evidence(
        [RecordedText(ids, np.zeros(len(ids), np.int8)) for ids in texts], [Mask(len(ids), np.arange(len(ids))) for ids in texts], {}
    )


def fit_context(graph: Graph, weights: Weights, evidence: Evidence, folder: Path) -> FitContext:
    """What a precision is given to fit the first model of a variant, whose weights go to `folder`."""
    return FitContext(graph, weights, evidence, Store(folder), SharedMatrices(), lambda _: None)


@torch.no_grad()
def passed_on(model: torch.nn.Module, layer: int, texts: Sequence[np.ndarray]) -> torch.Tensor:
    """Output of a decoder layer of a torch model, float32 [tokens, H]."""
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule(f"model.layers.{layer}").register_forward_hook(
        lambda _, __, out: outputs.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    for ids in texts:
        model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    hook.remove()
    return torch.cat(outputs)


def written(graph: Graph, weights: Weights, folder: Path, scheme: Scheme | None = None, head: RoutingHead | None = None) -> Path:
    """Bind weights to a copy of a graph and write it, as an export does."""
    graph = graph.clone()
    ort.end_with(graph, head)
    bind(graph, weights, scheme or Fp32(), Store(folder), lambda _: None)
    path = folder / "model.onnx"
    ir.save(graph.model, path)
    return path


def run(path: Path, ids: Sequence[int]) -> list[np.ndarray]:
    """The logits [S, V] of a whole text, and the routing scores [S, n] where the graph has them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {
        "input_ids": np.array([ids]),
        "seqlens_k": np.array([len(ids) - 1], np.int32),
        "total_sequence_length": np.array(len(ids), np.int32),
        "logit_positions": np.arange(len(ids)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past."):
            feeds[value.name] = np.zeros((1, value.shape[1], len(ids), value.shape[3]), np.float32)
    names = [output.name for output in session.get_outputs() if not output.name.startswith("present.")]
    return [np.asarray(output[0]) for output in session.run(names, feeds)]
