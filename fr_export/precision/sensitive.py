"""Which matrices a model cannot bear in few bits: measured where it shows, on what their decoder block passes on."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusionroute.calibration.blockwise_forward import Walk
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.precision.blockwise import Format, held, nearest, widened
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.residual_error import effect, few, stream

TOKENS = 2048  # read for the measurement
TIMES = 3.0  # the median error per weight from which on a matrix is sensitive


def sensitive(context: FitContext, forms: Mapping[str, Format], wide: Format, budget: float) -> tuple[str, ...]:
    """The matrices to store as `wide` instead of as `forms` says, the most sensitive first, within `budget` bits per weight on average.

    `forms` has all matrices that products read, which all count, but only those within decoder blocks are measured. None where the model was
    never asked.
    """
    texts = few(context.evidence.texts, TOKENS)
    if not texts:
        return ()
    errors = measure(context.graph, context.weights, texts, forms)
    sizes = {name: int(np.prod(context.graph.model.graph.initializers[name].shape)) for name in forms}
    per_weight = {name: error / sizes[name] for name, error in errors.items()}
    limit = TIMES * float(np.median(list(per_weight.values())))
    room = sum((budget - form.bits_per_weight) * sizes[name] for name, form in forms.items())
    kept = []
    for name in sorted(per_weight, key=lambda name: per_weight[name], reverse=True):
        cost = (wide.bits_per_weight - forms[name].bits_per_weight) * sizes[name]
        if per_weight[name] >= limit and cost <= room:
            kept.append(name)
            room -= cost
    return tuple(kept)


def measure(graph: Graph, weights: Weights, texts: Sequence[np.ndarray], forms: Mapping[str, Format]) -> dict[str, float]:
    """Matrix → `effect.effect` when it alone is rounded."""
    embed, read = reader(graph, weights)
    walk = Walk(split(graph), texts, embed, read)
    found: dict[str, float] = {}
    while walk.position < len(walk.blocks) - 1:
        exact = stream(walk.peek())
        for matrix, width in walk.block.channels.items():
            form = forms[matrix]
            (values,) = held([read(matrix)], form, matrix)
            rounded = widened(nearest(values, form), form, width)
            found[matrix] = effect(walk.peek({matrix: rounded}), exact)
        walk.advance()
    return found
