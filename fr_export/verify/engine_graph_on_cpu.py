"""Run graphs of the `tensorrt` dialects on ONNX Runtime's CPU provider, as their engines run.

Keys and values stay in buffers of fixed capacity. The CPU has no bf16 kernels: bf16 graphs are computed in fp32 and
rounded where the graph rounds (half_on_cpu.py).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from fusionroute.fr_export.verify.half_on_cpu import in_fp32
from fusionroute.runtime.manifest import Manifest, Variant

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


class EngineGraphOnCpu:
    """One model and its caches. `length` is the number of cached tokens; a smaller value forgets the rest."""

    def __init__(self, file: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures are raised, so nothing need be printed
        options.intra_op_num_threads = 1
        # At higher levels ONNX Runtime 1.32 crashes on fp16 graphs, and rounds the activations of int8 products too.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        model = ir.load(file)
        if ir.DataType.BFLOAT16 in {value.dtype for value in model.graph.inputs}:
            model = in_fp32(model)
        graph = ir.serde.serialize_model(model).SerializeToString()
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        past = [value for value in self._session.get_inputs() if value.name.startswith("past.")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._caches: dict[str, Any] = {value.name: np.zeros(value.shape, TYPES[value.type]) for value in past}
        self.capacity = int(past[0].shape[2])
        self.length = 0

    def forward(self, ids: Sequence[int], positions: Sequence[int] | None = None, keys: int | None = None) -> list[np.ndarray]:
        """Append ids. Returns logits float32 [K, V] (and the router's routing float32 [K, n_experts]).

        `positions` [K] are the places within `ids` that are answered; None means all. Attention reads the first `keys`
        positions of the caches: at least all that are filled, which is the default.
        """
        end = self.length + len(ids)
        feeds = self._caches | {
            "input_ids": np.array([ids], np.int64),
            "write_index": np.array([self.length], np.int64),
            "key_positions": np.arange(end if keys is None else keys),
            "logit_positions": np.arange(len(ids)) if positions is None else np.array(positions, np.int64),
        }
        results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        for name, cache in self._caches.items():
            if name.replace("past.", "present.") in results:
                self._caches[name] = results[name.replace("past.", "present.")]
            else:  # TensorRT 10.3's graphs return the new rows only
                cache[:, :, self.length : end] = results[name.replace("past.", "new.")]
        self.length = end
        return [results[name][0] for name in ("logits", "routing") if name in results]

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0, alone: int = 0) -> list[np.ndarray]:
        """What `forward` returns for every position of a text, read in chunks from empty caches, the last `alone` tokens
        one by one.

        Attention reads up to `spare` keys more than it needs.
        """
        self.length = 0
        parts = []
        behind = len(ids) - alone
        starts = [*range(0, behind, chunk), *range(behind, len(ids))]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            parts.append(self.forward(ids[start:end], keys=min(self.capacity, end + spare)))
        return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


class EngineSystemOnCpu:
    """All models of a variant for TensorRT, scored as a system."""

    def __init__(self, bundle: Path, manifest: Manifest, variant: Variant, coefficients: tuple[float, float]):
        self._models = [EngineGraphOnCpu(bundle / variant.graphs[model.name]) for model in manifest.models]
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
