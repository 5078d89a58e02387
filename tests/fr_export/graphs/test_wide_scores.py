"""Scores too large for half precision are computed in fp32 where attention is written out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.bundle.targets import TARGETS
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.families import FAMILIES
from fusionroute.fr_export.graphs.dialects import tensorrt_10_3
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.passes.to_half import score_products
from fusionroute.fr_export.graphs.trace import trace
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision import SCHEMES
from fusionroute.fr_export.precision.bind_weights import bind
from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu
from fusionroute.fr_export.verify.torch_reference import load
from tests.support.systems import Shape, make_system

TARGET = "tensorrt:10.3"
SHAPE = Shape("qwen2", experts=1, layers=1, hidden=256)
SIZE, CHANNELS = 15.0, 14  # of biases: scores are near 28 · 15² / √64 = 790, where bf16 has steps of 4


def biased(router: Path) -> None:
    """Give queries and keys large biases where rotary embeddings turn least, so that all scores grow alike."""
    weights = load_file(router / "model.safetensors")
    for name in ("q_proj", "k_proj"):
        heads = weights[f"model.layers.0.self_attn.{name}.bias"].view(-1, 2, SHAPE.head_size // 2)
        heads[:, :, -CHANNELS:] = SIZE
    save_file(weights, router / "model.safetensors", {"format": "pt"})


def logits(graph: Graph, system: System, wide_scores: bool, folder: Path, ids: list[int]) -> np.ndarray:
    """Of the router's graph in bf16."""
    folder.mkdir()
    graph = graph.clone()
    TARGETS[TARGET].prepare(graph, "bf16", replace(FAMILIES["qwen2"], wide_scores=wide_scores))
    tensorrt_10_3.end_with(graph, None)
    bind(graph, system.router.weights, SCHEMES[TARGET]["bf16"], Store(folder), lambda _: None)
    ir.save(graph.model, folder / "model.onnx")
    answer: np.ndarray = EngineGraphOnCpu(folder / "model.onnx").read(ids, 7)[0]
    return answer


def test_biases_that_make_scores_large_cost_no_accuracy(tmp_path: Path) -> None:
    router, experts = make_system(tmp_path / "system", SHAPE)
    biased(Path(router))
    system = System.open(None, router, experts, max_seq_len=64)
    ids = [int(i) for i in np.random.default_rng(1).integers(3, SHAPE.vocab, 50)]
    with torch.no_grad():
        exact = load(system.router)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    graph = trace(system.family, system.router.config, system.vocab_size, 64, tensorrt_10_3)
    assert len(score_products(graph)) == 2, "with the keys in the buffers, and with the new ones"
    narrow, wide = (np.abs(logits(graph, system, each, tmp_path / str(each), ids) - exact).mean() for each in (False, True))
    print(f"mean error {narrow:.3f} with scores in bf16, {wide:.3f} in fp32")
    assert wide < narrow / 2
    assert FAMILIES["qwen2"].wide_scores
