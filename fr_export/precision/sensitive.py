"""Which matrices need more bits: measured by what rounding each one alone does to the output of its decoder block."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.precision.blockwise import Format, in_range, nearest, widened
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.residual_error import residual_error, residual_stream, sample

TOKENS = 256  # read for the measurement
ROWS = 256  # rounded at a time: copies of more would not stay in a core's cache
TIMES = 3.0  # a matrix is sensitive from this multiple of the median error per weight


def sensitive(context: FitContext, formats: Mapping[str, Format], wide: Format, budget: float) -> tuple[str, ...]:
    """The matrices to store as `wide` instead of as `formats` says, the most sensitive first, within `budget` bits per
    weight on average.

    `formats` holds every matrix that a product reads. All count towards the average; only those in decoder blocks are
    measured. Empty for a model without texts.
    """
    texts = sample(context.evidence.texts, TOKENS)
    if not texts:
        return ()
    errors = measure(context.graph, context.weights, texts, formats, context.threads)
    if not errors:
        return ()
    sizes = {name: int(np.prod(context.graph.model.graph.initializers[name].shape)) for name in formats}
    per_weight = {name: error / sizes[name] for name, error in errors.items()}
    limit = TIMES * float(np.median(list(per_weight.values())))
    room = sum((budget - fmt.bits_per_weight) * sizes[name] for name, fmt in formats.items())
    chosen = []
    for name in sorted(per_weight, key=lambda name: per_weight[name], reverse=True):
        cost = (wide.bits_per_weight - formats[name].bits_per_weight) * sizes[name]
        if per_weight[name] >= limit and cost <= room:
            chosen.append(name)
            room -= cost
    return tuple(chosen)


def measure(
    graph: Graph, weights: Weights, texts: Sequence[np.ndarray], formats: Mapping[str, Format], threads: int | None = None
) -> dict[str, float]:
    """Matrix → `residual_error` of rounding it alone. `threads` as for `BlockwiseForward`."""
    embed, read = reader(graph, weights)
    walk = BlockwiseForward(split(graph), texts, embed, read, threads)
    errors: dict[str, float] = {}
    while walk.position < len(walk.blocks) - 1:
        passed_on = walk.peek()
        exact = residual_stream(passed_on)
        for matrix, width in walk.block.channels.items():
            if matrix not in formats:
                continue
            fmt = formats[matrix]
            (values,) = in_range([read(matrix)], fmt, matrix)
            parts = np.array_split(values, -(-len(values) // ROWS))
            rounded = np.concatenate([widened(nearest(part, fmt), fmt.bits, width) for part in parts])
            errors[matrix] = residual_error(walk.peek({matrix: rounded}), exact)
        walk.move(passed_on)
    return errors
