"""Random walks over a graph with caches: appending, rewinding, and reading more keys than needed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.fr_export.verify.engine_graph_on_cpu import EngineGraphOnCpu


def check_rewinds(model: EngineGraphOnCpu, ids: list[int], expected: np.ndarray, bound: float) -> None:
    """Assert that every walk gives the logits `expected` float32 [S, V] of one pass over the text, within `bound`."""

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20), st.integers(0, 30), st.booleans()), min_size=1, max_size=6))
    def walk(steps: list[tuple[int, int, int, bool]]) -> None:
        model.length = 0
        for back, count, spare, strange in steps:
            model.length = start = min(back, model.length)
            if strange:  # tokens that the rewind takes back
                model.forward(ids[:9])
                model.length = start
            piece = ids[start : start + count]
            if not piece:
                continue
            positions = sorted({0, len(piece) // 2, len(piece) - 1})
            logits = model.forward(piece, positions, keys=min(model.capacity, start + len(piece) + spare))[0]
            assert np.abs(logits - expected[[start + position for position in positions]]).max() < bound

    walk()
