"""Pair bundles of small systems, and a plain reader of pair graphs: every pass allocates what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import load_file

from fusionroute.runtime.manifest import Manifest
from tests.support.adapters import make_adapted_system, peft_model
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape


@dataclass(frozen=True)
class SharedSystem:
    """A base, the adapters of router and experts over it, and their bundle."""

    bundle: Path
    base: Path
    router: str
    experts: dict[str, str]


def export_shared(
    folder: Path,
    shape: Shape,
    options: list[dict[str, Any]],
    precisions: tuple[str, ...] = ("fp32",),
    targets: tuple[str, ...] = ("ort:cpu",),
    max_seq_len: int | None = None,
    calibration: str = "none",
) -> SharedSystem:
    """Make a system of adapters as `make_adapted_system` does, and export it with one base to `folder/bundle`."""
    base, router, experts = make_adapted_system(folder, shape, options)
    bundle = export_checkpoints(
        folder / "bundle", shape, router, experts, precisions, max_seq_len, calibration, shared_base=True, targets=targets
    )
    return SharedSystem(bundle, base, router, experts)


@dataclass
class Memory:
    """One model's KV buffers by the names of its inputs without prefix, and how many tokens they hold."""

    buffers: dict[str, np.ndarray] = field(default_factory=dict)
    length: int = 0


def opened(graph: Path) -> onnxruntime.InferenceSession:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class PairReader:
    """A pair graph with an expert bound. `head`: its head, if that is a graph of its own."""

    def __init__(self, graph: Path, factors: Mapping[str, np.ndarray], head: Path | None = None, capacity: int = 64):
        self.session, self.head = opened(graph), None if head is None else opened(head)
        self.factors = factors
        shapes = {
            each.name: (1, each.shape[1], capacity, each.shape[3]) for each in self.session.get_inputs() if each.name.startswith("past.")
        }
        self.router, self.expert = (Memory({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}) for _ in range(2))

    @classmethod
    def open(cls, bundle: Path, precision: str, expert: str) -> PairReader:
        """A bundle's graph in one precision, and the factors of an expert as the safetensors library reads them."""
        pair = next(each.pair for each in Manifest.read(bundle).variants if each.precision == precision)
        assert pair is not None
        return cls(bundle / pair.graph, load_file(bundle / pair.factors[expert]), None if pair.head is None else bundle / pair.head)

    def read(self, router: list[int], expert: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One pass over tokens of both: logits of each [S, V], and the router's routing scores [S, n]."""
        count = len(router) + len(expert)
        feeds: dict[str, Any] = {
            **self.factors,
            "input_ids": np.array([[*router, *expert]], np.int64),
            "segments": np.array([len(router), len(expert)], np.int64),
            "logit_positions": np.arange(count),
        }
        for prefix, memory, ids in (("", self.router, router), ("expert.", self.expert, expert)):
            memory.length += len(ids)
            feeds |= {prefix + name: buffer for name, buffer in memory.buffers.items()}
            feeds[f"{prefix}seqlens_k"] = np.array([memory.length - 1], np.int32)
            feeds[f"{prefix}total_sequence_length"] = np.array(memory.length, np.int32)
        results = dict(zip((output.name for output in self.session.get_outputs()), self.session.run(None, feeds), strict=True))
        for prefix, memory in (("", self.router), ("expert.", self.expert)):
            memory.buffers = {name: results[prefix + name.replace("past", "present")] for name in memory.buffers}
        if self.head is not None:
            results["logits"] = self.head.run(["logits"], {"hidden": results["hidden"]})[0]
        logits, routing = results["logits"][0], results["routing"][0]
        return logits[: len(router)], logits[len(router) :], routing[: len(router)]


def peft_logits(system: SharedSystem, ids: list[int]) -> list[np.ndarray]:
    """The logits [S, V] of the router and the experts, by PEFT without merging."""
    models = [peft_model(system.base, Path(folder)) for folder in (system.router, *system.experts.values())]
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for model in models]
