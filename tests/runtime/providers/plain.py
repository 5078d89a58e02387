"""The same graphs run by `session.run` with copies of everything: the results that every binding must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from fusionroute.runtime.manifest import Manifest, Variant

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Reader:
    """One model, and its caches as plain arrays."""

    def __init__(self, path: Path, capacity: int, kv_heads: int, head_size: int, level: str):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {value.name: value.type for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._scattered = "write_index" in inputs
        shape = (1, kv_heads, capacity, head_size)
        self._caches = {name: np.zeros(shape, TYPES[kind]) for name, kind in inputs.items() if name.startswith("past.")}
        self.length = 0

    def forward(self, ids: list[int], positions: list[int]) -> dict[str, np.ndarray]:
        """Append tokens; logits [K, V] and routing [K, n] of some of them."""
        end = self.length + len(ids)
        feeds: dict[str, Any] = {"input_ids": np.array([ids]), "logit_positions": np.array(positions)}
        if self._scattered:
            feeds |= {"write_index": np.array([self.length]), "key_positions": np.arange(end)}
        else:
            feeds |= {"seqlens_k": np.array([end - 1], np.int32), "total_sequence_length": np.array(end, np.int32)}
        caches = {name: cache.copy() for name, cache in self._caches.items()}
        outputs = dict(zip(self._outputs, self._session.run(None, feeds | caches), strict=True))
        self._caches = {name: outputs[name.replace("past.", "present.")] for name in self._caches}
        self.length = end
        return {name: outputs[name][0] for name in ("logits", "routing") if name in outputs}


class Step(NamedTuple):
    """Fused and penalised logits float64 [V], the token's log-probability without penalty, and routing [n]."""

    fused: np.ndarray
    logprob: float
    routing: np.ndarray


class Plain:
    """One text: greedy steps of router, expert and weighted fusion, with a repetition penalty; every model reads what
    it missed in chunks.
    """

    def __init__(self, folder: Path, variant: Variant, chunk: int, level: str):
        manifest = Manifest.read(folder)
        self._lam, self._chunk = manifest.lam, chunk
        self._models = [
            Reader(folder / variant.graphs[spec.name], manifest.max_seq_len, spec.kv_heads, spec.head_size, level)
            for spec in manifest.models
        ]
        self.tokens: list[int] = []

    def rewind(self, count: int) -> None:
        del self.tokens[count:]
        for model in self._models:
            model.length = min(model.length, count)

    def step(self, token: int, expert: int, penalty: float = 1.0) -> Step:
        """What the models say where the next token and its expert are these."""
        routed = self._read(0)
        answered = self._read(1 + expert)
        raw = (self._lam * routed["logits"] + (1 - self._lam) * answered["logits"])[0].astype(np.float64)
        fused = raw.copy()
        seen = np.unique(self.tokens)
        fused[seen] = np.where(raw[seen] > 0, raw[seen] / penalty, raw[seen] * penalty)
        self.tokens.append(token)
        return Step(fused, float(raw[token] - raw.max() - np.log(np.exp(raw - raw.max()).sum())), routed["routing"][0])

    def _read(self, number: int) -> dict[str, np.ndarray]:
        model = self._models[number]
        model.length = min(model.length, len(self.tokens) - 1)
        while True:
            piece = self.tokens[model.length : model.length + self._chunk]
            outputs = model.forward(piece, [len(piece) - 1])
            if model.length == len(self.tokens):
                return outputs

    def score(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Fused logits [S, V] and experts [S] at every position, read in chunks."""

        def read(model: Reader) -> list[np.ndarray]:
            model.length = 0
            parts = []
            for begin in range(0, len(ids), self._chunk):
                piece = ids[begin : begin + self._chunk]
                parts.append(model.forward(piece, list(range(len(piece)))))
            return [np.concatenate([part[name] for part in parts]) for name in parts[0]]

        logits, routing = read(self._models[0])
        choice = routing.argmax(-1)
        fused = self._lam * logits
        for expert in np.unique(choice):
            (answered,) = read(self._models[1 + expert])
            fused[choice == expert] += (1 - self._lam) * answered[choice == expert]
        return fused, choice
