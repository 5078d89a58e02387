"""The same graphs run one after another, without the runtime: the result that every schedule must have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusionroute.runtime.backends.mapped_factors import map_factors
from fusionroute.runtime.limits import EXPERT
from fusionroute.runtime.manifest import Manifest, Pair
from tests.support.simulated.graphs import graph


class Reader:
    """One model with its caches as plain arrays: of a graph of its own, or the one of a pair whose names begin with
    `prefix`.

    fixed: what else its graph takes, such as factors and a dummy token for the other one of the pair.
    """

    def __init__(self, path: Path, prefix: str = "", fixed: dict[str, Any] | None = None):
        self._graph, self._prefix, self._fixed = graph(path), prefix, fixed or {}
        kinds = {name: kind for name, kind in self._graph.inputs.items() if name.startswith(f"{prefix}past.")}
        self._caches = {name: np.zeros(shape, kind) for name, (_, kind, shape) in kinds.items()}
        self.length = 0

    def read(self, ids: list[int]) -> dict[str, np.ndarray]:
        """Outputs for the last of more tokens, by their names without prefix."""
        own: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "write_index": np.array([self.length]),
            "key_positions": np.arange(self.length + len(ids)),
            "logit_positions": np.array([len(ids) - 1]),
        }
        outputs = self._graph.run(self._fixed | {self._prefix + name: array for name, array in own.items()} | self._caches)
        for name, cache in self._caches.items():
            if name.replace("past.", "new.") in outputs:
                cache[:, :, self.length : self.length + len(ids)] = outputs[name.replace("past.", "new.")]
            else:
                self._caches[name] = outputs[name.replace("past.", "present.")]
        self.length += len(ids)
        return {name.removeprefix(self._prefix): array for name, array in outputs.items() if name.startswith(self._prefix)}


def readers_of_pair(folder: Path, pair: Pair, experts: list[str]) -> list[Reader]:
    """The router and the experts of one graph, each beside a dummy token."""
    path = folder / pair.graph
    inputs = graph(path).inputs
    factors = []
    for name in experts:  # bf16 is read as its bits
        arrays = map_factors(folder / pair.factors[name])
        factors.append({each: array.view(inputs[each][1]) for each, array in arrays.items()})

    def idle(prefix: str) -> dict[str, Any]:
        small = {"input_ids": [[0]], "write_index": [0], "key_positions": [0], "logit_positions": [0]}
        caches = {name: np.zeros(shape, kind) for name, (_, kind, shape) in inputs.items() if name.startswith(f"{prefix}past.")}
        return {prefix + name: np.array(value) for name, value in small.items()} | caches

    return [Reader(path, fixed=idle(EXPERT) | factors[0]), *(Reader(path, EXPERT, idle("") | each) for each in factors)]


def in_turn(folder: Path, prompt: list[int], count: int, chunk: int, precision: str | None = None) -> tuple[list[int], list[str]]:
    """Greedy tokens, and the expert that gave each."""
    manifest = Manifest.read(folder)
    variant = next(v for v in manifest.variants if v.target.startswith("tensorrt") and precision in (None, v.precision))
    if variant.pair is None:
        models = [Reader(folder / variant.graphs[model.name]) for model in manifest.models]
    else:
        models = readers_of_pair(folder, variant.pair, manifest.experts)

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
