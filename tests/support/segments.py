"""A plain reader of graphs in which every expert has a segment: every pass allocates what it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fusionroute.runtime.manifest import Manifest
from tests.support.pairs import Memory, opened


class SegmentReader:
    """A bundle's graph in one precision, and its head. `memories`: the router's, then each expert's."""

    def __init__(self, bundle: Path, precision: str, capacity: int = 64):
        manifest = Manifest.read(bundle)
        pair = next(each.pair for each in manifest.variants if each.precision == precision)
        assert pair is not None and pair.head is not None and pair.every_expert
        self.session, self.head = opened(bundle / pair.graph), opened(bundle / pair.head)
        self.factors = [load_file(bundle / pair.factors[name]) for name in manifest.experts]
        shapes = {
            each.name: (1, each.shape[1], capacity, each.shape[3]) for each in self.session.get_inputs() if each.name.startswith("past.")
        }
        self.memories = [
            Memory({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}) for _ in range(len(self.factors) + 1)
        ]

    def read(self, texts: Sequence[list[int]]) -> tuple[list[np.ndarray], np.ndarray]:
        """A pass over a text of each model, which may be empty: the logits [S, V] of each, and the router's scores."""
        counts = [*map(len, texts), sum(map(len, texts)) % 2]
        ids = [token for text in texts for token in text]
        inputs = {
            "input_ids": np.array([ids + [7] * counts[-1]], np.int64), "logit_positions": np.arange(len(ids)),
            "segments": np.array(counts, np.int64),
        }  # fmt: skip
        for place, (memory, text) in enumerate(zip(self.memories, texts, strict=True)):
            prefix, total = f"{place - 1}.expert." if place else "", max(memory.length + len(text), 1)
            inputs |= {prefix + name: buffer for name, buffer in memory.buffers.items()}
            inputs |= {f"{prefix}seqlens_k": np.array([total - 1], np.int32), f"{prefix}total_sequence_length": np.array(total, np.int32)}
            memory.length += len(text)
        for number, factors in enumerate(self.factors):
            inputs |= {f"{number}.{name}": array for name, array in factors.items()}
        names = [each.name for each in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, inputs), strict=True))
        for place, memory in enumerate(self.memories):
            prefix = f"{place - 1}.expert." if place else ""
            memory.buffers = {name: outputs[f"{prefix}{name.replace('past', 'present')}"] for name in memory.buffers}
        logits = self.head.run(None, {"hidden": outputs["hidden"]})[0][0]
        stops = np.cumsum(counts[:-1])
        return np.split(logits, stops[:-1]), outputs["routing"][0, : counts[0]]
