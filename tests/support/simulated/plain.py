"""The same graphs run one after another, without the runtime: the result that every schedule must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime.manifest import Manifest
from tests.support.simulated.graphs import graph


class Reader:
    """One model with its caches as plain arrays."""

    def __init__(self, path: Path):
        self._graph = graph(path)
        self._caches = {name: np.zeros(shape, kind) for name, (_, kind, shape) in self._graph.inputs.items() if name.startswith("past.")}
        self.length = 0

    def read(self, ids: list[int]) -> dict[str, np.ndarray]:
        """Outputs for the last of more tokens."""
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "write_index": np.array([self.length]),
            "key_positions": np.arange(self.length + len(ids)),
            "logit_positions": np.array([len(ids) - 1]),
        }
        outputs = self._graph.run(feeds | self._caches)
        for name, cache in self._caches.items():
            if name.replace("past.", "new.") in outputs:
                cache[:, :, self.length : self.length + len(ids)] = outputs[name.replace("past.", "new.")]
            else:
                self._caches[name] = outputs[name.replace("past.", "present.")]
        self.length += len(ids)
        return outputs


def in_turn(folder: Path, prompt: list[int], count: int, chunk: int, precision: str | None = None) -> tuple[list[int], list[str]]:
    """Greedy tokens, and the expert that gave each."""
    manifest = Manifest.read(folder)
    variant = next(v for v in manifest.variants if v.target.startswith("tensorrt") and precision in (None, v.precision))
    models = [Reader(folder / variant.graphs[model.name]) for model in manifest.models]

    def catch_up(model: Reader, text: list[int]) -> dict[str, np.ndarray]:
        while True:
            outputs = model.read(text[model.length : model.length + chunk])
            if model.length == len(text):
                return outputs

    text, experts = list(prompt), []
    for _ in range(count):
        routed = catch_up(models[0], text)
        choice = int(routed["routing"][0, 0].argmax())
        answered = catch_up(models[1 + choice], text)
        fused = manifest.lam * routed["logits"][0, 0] + (1 - manifest.lam) * answered["logits"][0, 0]
        text.append(int(fused.argmax()))
        experts.append(manifest.experts[choice])
    return text[len(prompt) :], experts
