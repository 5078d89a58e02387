"""Which matrices need more bits: measured by what rounding each one alone does to the output of its decoder block."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusionroute.calibration.blockwise_forward import BlockwiseForward, States
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import reader
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.stages import stages
from fusionroute.fr_export.precision.blockwise import Format, in_range, nearest, widened
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.products import multiply
from fusionroute.fr_export.precision.residual_error import residual_error, residual_stream, sample

TOKENS = 256  # read for the measurement
ROWS = 1024  # rounded at a time: each rounding makes copies
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
    walk = BlockwiseForward(stages(graph), texts, embed, read, threads, multiply=multiply)
    errors: dict[str, float] = {}
    changed: dict[str, list[States]] = {}  # by each matrix of the decoder block that was rounded alone
    while walk.position < len(walk.blocks) - 1:
        if not walk.block.observed:  # what enters is what a decoder block passes on
            exact = residual_stream(walk.states)
            errors |= {matrix: residual_error(states, exact) for matrix, states in changed.items()}
            changed = {}
        changed = {matrix: walk.peek(states=states) for matrix, states in changed.items()}
        for matrix, width in walk.block.channels.items():
            if matrix in formats:
                changed[matrix] = walk.peek({matrix: rounded(read(matrix), formats[matrix], width, matrix)})
        walk.advance()
    return errors


def rounded(values: np.ndarray, fmt: Format, width: int, name: str) -> np.ndarray:
    """The matrix `name` float32 [R, width] to the nearest values of its blocks."""
    (values,) = in_range([values], fmt, name)
    parts = np.array_split(values, -(-len(values) // ROWS))
    return np.concatenate([widened(nearest(part, fmt), fmt.bits, width) for part in parts])
