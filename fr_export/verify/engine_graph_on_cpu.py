"""Run graphs of the `tensorrt` dialects on ONNX Runtime's CPU provider, as their engines run.

Keys and values stay in buffers of fixed capacity. The CPU has no bf16 kernels: bf16 graphs are computed in fp32 and
rounded where the graph rounds (half_on_cpu.py).
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from fusionroute.fr_export.verify.fp4_on_cpu import widen_fp4
from fusionroute.fr_export.verify.half_on_cpu import in_fp32, widened
from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.limits import DELTA, EXPERT
from fusionroute.runtime.manifest import Manifest, Pair, Variant

CHUNK = 128  # tokens
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@functools.cache
def opset_obstacle(opset: int) -> str | None:
    """Why the installed ONNX Runtime cannot run graphs of an opset, or None: older releases refuse newer opsets."""
    import onnxruntime

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", [x], [y])
    probe = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)])
    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:  # it raises a class of its own for each status
        return f"ONNX Runtime {onnxruntime.__version__}, which runs them for the comparison, does not read opset {opset}"
    return None


def open_graph(file: Path) -> Any:
    """An inference session of a graph for TensorRT."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised, so nothing need be printed
    options.intra_op_num_threads = 1
    # At higher levels ONNX Runtime 1.32 crashes on fp16 graphs, and rounds the activations of int8 products too.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    model = ir.load(file)
    if ir.DataType.FLOAT4E2M1 in {value.dtype for value in model.graph.initializers.values()}:
        model = widen_fp4(model)
    if ir.DataType.BFLOAT16 in {value.dtype for value in model.graph.inputs}:
        model = in_fp32(model)
    graph = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Text:
    """One model's caches. `length` is the number of cached tokens; a smaller value forgets the rest.

    prefix: of the names of the model's inputs and outputs in its graph.
    """

    def __init__(self, session: Any, prefix: str = ""):
        self._prefix = prefix
        past = [value for value in session.get_inputs() if value.name.startswith(f"{prefix}past.")]
        self._caches: dict[str, Any] = {value.name: np.zeros(value.shape, TYPES[value.type]) for value in past}
        self.capacity = int(past[0].shape[2])
        self.length = 0

    def feeds(self, ids: Sequence[int], positions: Sequence[int] | None = None, keys: int | None = None) -> dict[str, Any]:
        """The inputs of a pass that appends ids; see `EngineGraphOnCpu.forward`."""
        end = self.length + len(ids)
        own = {
            "input_ids": np.array([ids], np.int64),
            "write_index": np.array([self.length], np.int64),
            "key_positions": np.arange(end if keys is None else keys),
            "logit_positions": np.arange(len(ids)) if positions is None else np.array(positions, np.int64),
        }
        return self._caches | {self._prefix + name: array for name, array in own.items()}

    def keep(self, results: Mapping[str, Any], count: int) -> None:
        """Take the keys and values of so many new tokens from what the pass returned."""
        end = self.length + count
        for name, cache in self._caches.items():
            if name.replace("past.", "present.") in results:
                self._caches[name] = results[name.replace("past.", "present.")]
            else:  # TensorRT 10.3's graphs return the new rows only
                cache[:, :, self.length : end] = results[name.replace("past.", "new.")]
        self.length = end


class EngineGraphOnCpu:
    """One model and its caches."""

    def __init__(self, file: Path):
        self._session = open_graph(file)
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._text = Text(self._session)
        self.capacity = self._text.capacity

    @property
    def length(self) -> int:
        """See `Text`."""
        return self._text.length

    @length.setter
    def length(self, length: int) -> None:
        self._text.length = length

    def forward(self, ids: Sequence[int], positions: Sequence[int] | None = None, keys: int | None = None) -> list[np.ndarray]:
        """Append ids. Returns logits float32 [K, V] (and the router's routing float32 [K, n_experts]).

        `positions` [K] are the places within `ids` that are answered; None means all. Attention reads the first `keys`
        positions of the caches: at least all that are filled, which is the default.
        """
        results = dict(zip(self._outputs, self._session.run(None, self._text.feeds(ids, positions, keys)), strict=True))
        self._text.keep(results, len(ids))
        return [results[name][0] for name in ("logits", "routing") if name in results]

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0, alone: int = 0) -> list[np.ndarray]:
        """What `forward` returns for every position of a text, read in chunks from empty caches, the last `alone` tokens
        one by one.

        Attention reads up to `spare` keys more than it needs.
        """
        self.length = 0
        parts = [self.forward(ids[start:end], keys=min(self.capacity, end + spare)) for start, end in pieces(len(ids), chunk, alone)]
        return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


class EnginePairOnCpu:
    """A graph for router and expert, and the caches of both."""

    def __init__(self, file: Path, factors: Mapping[str, np.ndarray]):
        self._session = open_graph(file)
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.router, self.expert = Text(self._session), Text(self._session, EXPERT)
        types = {value.name: TYPES[value.type] for value in self._session.get_inputs() if value.name.startswith(DELTA)}
        self._factors = {name: widened(factors[name]).astype(dtype) for name, dtype in types.items()}

    def forward(
        self, router: Sequence[int], expert: Sequence[int], answered: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
        keys: tuple[int | None, int | None] = (None, None),
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Append ids to both. Returns `logits`, `routing` and `expert.logits`, float32 [K, V] or [K, n_experts].

        The arguments are those of `EngineGraphOnCpu.forward`, for router and expert.
        """
        feeds = self.router.feeds(router, answered[0], keys[0]) | self.expert.feeds(expert, answered[1], keys[1]) | self._factors
        results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        self.router.keep(results, len(router))
        self.expert.keep(results, len(expert))
        return {name: results[name][0] for name in ("logits", "routing", f"{EXPERT}logits")}


class OneOfPair:
    """One model of a pair's graph. Beside what it reads, the other one reads a dummy token."""

    def __init__(self, pair: EnginePairOnCpu, is_expert: bool):
        self._pair, self._is_expert = pair, is_expert

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0, alone: int = 0) -> list[np.ndarray]:
        """See `EngineGraphOnCpu.read`."""
        mine, other = (self._pair.expert, self._pair.router) if self._is_expert else (self._pair.router, self._pair.expert)
        mine.length = 0
        parts = []
        for start, end in pieces(len(ids), chunk, alone):
            other.length, keys = 0, min(mine.capacity, end + spare)
            if self._is_expert:
                parts.append([self._pair.forward([0], ids[start:end], keys=(None, keys))[f"{EXPERT}logits"]])
            else:
                results = self._pair.forward(ids[start:end], [0], keys=(keys, None))
                parts.append([results["logits"], results["routing"]])
        return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


def models_of_pair(bundle: Path, pair: Pair, experts: Sequence[str]) -> list[OneOfPair]:
    """The router and the experts of a bundle with one base."""
    pairs = [EnginePairOnCpu(bundle / pair.graph, map_factors(bundle / pair.factors[name])) for name in experts]
    return [OneOfPair(pairs[0], is_expert=False), *(OneOfPair(each, is_expert=True) for each in pairs)]


def pieces(length: int, chunk: int, alone: int) -> list[tuple[int, int]]:
    """Where the passes over a text begin and end: chunks, and the last `alone` tokens one by one."""
    behind = length - alone
    starts = [*range(0, behind, chunk), *range(behind, length)]
    return list(zip(starts, [*starts[1:], length], strict=True))


class Readable(Protocol):
    """A model that reads a text from its beginning; see `EngineGraphOnCpu.read`."""

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0, alone: int = 0) -> list[np.ndarray]:
        """Logits float32 [S, V], and a router's routing scores float32 [S, n_experts]."""
        ...


class EngineSystemOnCpu:
    """All models of a variant for TensorRT, scored as a system."""

    def __init__(self, bundle: Path, manifest: Manifest, variant: Variant, coefficients: tuple[float, float]):
        self._models: Sequence[Readable]
        if variant.pair is None:
            self._models = [EngineGraphOnCpu(bundle / variant.graphs[model.name]) for model in manifest.models]
        else:
            self._models = models_of_pair(bundle, variant.pair, manifest.experts)
        self._coefficients = coefficients

    def score(self, ids: Sequence[int], alone: int) -> tuple[np.ndarray, np.ndarray]:
        """Fused logits float32 [P, V] and the chosen experts int64 [P] at every position of a text, read in chunks; or
        at the last `alone` ones, which are read one by one.
        """
        router, *experts = self._models
        first = len(ids) - alone if alone else 0
        fused, routing = (part[first:] for part in router.read(ids, CHUNK, alone=alone))
        chosen = routing.argmax(-1)
        fused = self._coefficients[0] * fused
        for number in np.unique(chosen):
            mine = chosen == number
            fused[mine] += self._coefficients[1] * experts[number].read(ids, CHUNK, alone=alone)[0][first:][mine]
        return fused, chosen
