"""Which matrices a model cannot bear in few bits: measured where it shows, on what their decoder block passes on."""

from collections.abc import Sequence

import numpy as np

from calibration.walk import States, Walk
from fr_export.blocks import matrices, reader, split
from fr_export.graph import Graph
from fr_export.precision.blockwise import Format, held, nearest, widened
from fr_export.precision.evidence import Evidence
from fr_export.weights import Weights

TOKENS = 2048  # read for the measurement
TIMES = 3.0  # the median error per weight from which on a matrix is sensitive


def sensitive(graph: Graph, weights: Weights, known: Evidence, form: Format, wide: Format, budget: float) -> tuple[str, ...]:
    """The matrices to store as `wide` instead of as `form`, the most sensitive first, within `budget` bits per weight on average.

    Counted are all matrices that products read, but only those within decoder blocks are measured. None where the model was never asked.
    """
    texts = few(known.texts)
    if not texts:
        return ()
    errors = measure(graph, weights, texts, form)
    shapes = {name: [int(size) for size in graph.model.graph.initializers[name].shape] for name in errors}
    sizes = {name: out * width for name, (out, width) in shapes.items()}
    per_weight = {name: error / sizes[name] for name, error in errors.items()}
    limit = TIMES * float(np.median(list(per_weight.values())))
    room = (budget - form.bits_per_weight) * total(graph)
    kept = []
    for name in sorted(per_weight, key=lambda name: per_weight[name], reverse=True):
        cost = (wide.bits_per_weight - form.bits_per_weight) * sizes[name]
        if per_weight[name] >= limit and cost <= room:
            kept.append(name)
            room -= cost
    return tuple(kept)


def measure(graph: Graph, weights: Weights, texts: Sequence[np.ndarray], form: Format) -> dict[str, float]:
    """Matrix → mean squared change of its block's output, relative to the squared output of each token, when it alone is rounded.

    What a block passes on may be several tensors: the residual stream is their sum.
    """
    embed, read = reader(graph, weights)
    walk = Walk(split(graph), texts, embed, read)
    found: dict[str, float] = {}
    while walk.position < len(walk.blocks) - 1:
        exact = stream(walk.peek())
        for matrix, width in walk.block.channels.items():
            (values,) = held([read(matrix)], form, matrix)
            rounded = widened(nearest(values, form), form, width)
            changed = stream(walk.peek({matrix: rounded}))
            found[matrix] = float((np.square(changed - exact).sum(-1) / np.square(exact).sum(-1)).mean())
        walk.advance()
    return found


def stream(states: Sequence[States]) -> np.ndarray:
    """The residual stream float32 [tokens, H] of all texts."""
    return np.concatenate([np.sum(parts, axis=0)[0] for parts in states])


def few(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Texts from all over the set, of together about TOKENS tokens."""
    step = max(1, sum(map(len, texts)) // TOKENS)
    return list(texts[::step])


def total(graph: Graph) -> int:
    """Values of all matrices that products read."""
    return sum(int(np.prod(graph.model.graph.initializers[name].shape)) for name in matrices(graph))
