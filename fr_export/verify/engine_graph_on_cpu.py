"""Graphs of the `tensorrt` dialects run on ONNX Runtime's CPU provider, as their engines run: keys and values stay in buffers of fixed capacity.

What the CPU has no kernels for, bf16, is computed in fp32 and rounded where the graph rounds (fr_export/verify/half_on_cpu.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.fr_export.verify.half_on_cpu import in_fp32
from fusionroute.runtime.manifest import Manifest, Variant

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class InPlace:
    """One model and its caches. `length` is the number of tokens that they hold; making it smaller forgets the rest."""

    def __init__(self, file: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # failures are raised; nothing is printed
        options.intra_op_num_threads = 1
        # further up, 1.32 crashes on fp16 graphs and replaces products of int8 weights by ones that round activations too
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

    def forward(self, ids: Sequence[int], wanted: Sequence[int] | None = None, keys: int | None = None) -> list[np.ndarray]:
        """Append ids; logits float32 [K, V] (and routing [K, n]) of the `wanted` positions within them, of all where None.

        Attention reads `keys` positions of the caches, at least those that are filled then.
        """
        end = self.length + len(ids)
        feeds = self._caches | {
            "input_ids": np.array([ids], np.int64),
            "write_index": np.array([self.length], np.int64),
            "key_positions": np.arange(end if keys is None else keys),
            "logit_positions": np.arange(len(ids)) if wanted is None else np.array(wanted, np.int64),
        }
        found = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        for name, cache in self._caches.items():
            if name.replace("past.", "present.") in found:
                self._caches[name] = found[name.replace("past.", "present.")]
            else:  # of TensorRT 10.3: new rows only
                cache[:, :, self.length : end] = found[name.replace("past.", "new.")]
        self.length = end
        return [found[name][0] for name in ("logits", "routing") if name in found]

    def read(self, ids: Sequence[int], chunk: int, spare: int = 0) -> list[np.ndarray]:
        """The answers for every position of a text, from empty caches and in chunks, with up to `spare` keys more than needed."""
        self.length = 0
        parts = []
        for start in range(0, len(ids), chunk):
            piece = ids[start : start + chunk]
            parts.append(self.forward(piece, keys=min(self.capacity, start + len(piece) + spare)))
        return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


class EngineSystemOnCpu:
    """All models of one variant for TensorRT of a bundle."""

    def __init__(self, bundle: Path, manifest: Manifest, variant: Variant, coefficients: tuple[float, float]):
        self._models = [InPlace(bundle / variant.graphs[model.name]) for model in manifest.models]
        self._coefficients = coefficients

    def score(self, ids: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Fused logits float32 [S, V] and the experts chosen int64 [S] at every position of a text."""
        router, *experts = self._models
        fused, routing = router.read(ids, chunk)
        chosen = routing.argmax(-1)
        fused = self._coefficients[0] * fused
        for number in np.unique(chosen):
            mine = chosen == number
            fused[mine] += self._coefficients[1] * experts[number].read(ids, chunk)[0][mine]
        return fused, chosen
