"""GPTQ for a whole model: its matrices are rounded in order while the calibration texts pass through it.

Each decoder block is rounded on the inputs that the rounded blocks before it give, so that errors do not accumulate.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.fr_export.graphs.decoder_blocks import reader, split
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.source_rows import counted, digest, rows
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format, Stored, attach, in_range, sliced, store_blocks
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq import Factor, Hessian, quantise
from fusionroute.fr_export.precision.scheme import Scheme

Attach = Callable[[Graph, ir.Value, Stored, Store], None]


def in_blocks(graph: Graph, matrix: ir.Value, stored: Stored, store: Store) -> None:
    """Let ONNX Runtime's block-wise operators read the stored matrix."""
    attach(graph, matrix, stored)


class FittedByGptq:
    """The matrices of one model as `round_sequentially` stored them. `attach` rewrites their readers; all other
    matrices go to `rest`.
    """

    def __init__(self, rest: Scheme, stored: Mapping[str, Stored], attach: Attach = in_blocks):
        values = sum(each.values.length * 8 // each.format.bits for each in stored.values())
        self.name, self.bits = rest.name, sum(each.bytes for each in stored.values()) * 8 / values if values else rest.bits
        self._rest, self._stored, self._attach = rest, stored, attach

    @property
    def about(self) -> dict[str, Any]:
        """For the report: the matrices stored with more bits than the others."""
        fewest = min((each.format.bits for each in self._stored.values()), default=0)
        return {"sensitive": [name for name, each in self._stored.items() if each.format.bits > fewest]}

    def bind(self, graph: Graph, matrix: ir.Value, rows: Iterator[np.ndarray], store: Store) -> None:
        """Replace the operators that read the matrix."""
        if matrix.name in self._stored:
            self._attach(graph, matrix, self._stored[matrix.name], store)
        else:
            self._rest.bind(graph, matrix, rows, store)


def round_sequentially(context: FitContext, formats: Mapping[str, Format]) -> dict[str, Stored]:
    """Round the matrices of `formats` (matrix → its format) by GPTQ and return them by name; empty for a model without
    texts.

    Memory: one decoder block in fp32 twice, its Hessians, and the states of all texts. Raises InputError as `Weights`
    and `BlockwiseForward` do.
    """
    graph, weights, shared = context.graph, context.weights, context.shared.stored
    done: dict[str, Stored] = {}
    if not context.evidence.texts:
        return done
    embed, read = reader(graph, weights)
    walk = BlockwiseForward(split(graph), context.evidence.texts, embed, read)
    while not walk.done:
        factors = inputs(walk, formats)
        replaced = {}
        for matrix, factor in factors.items():
            fmt = formats[matrix]
            key = f"{fmt.bits}-{fmt.block}-{fmt.signed}-{digest(rows(graph.sources[matrix], weights))}"
            if key not in shared:
                pieces = counted(sliced(in_range(rows(graph.sources[matrix], weights), fmt, matrix), factor.channels), context.advance)
                shared[key] = store_blocks((quantise(piece, factor, fmt) for piece in pieces), fmt, context.store)
            done[matrix] = shared[key]
            if walk.position < len(walk.blocks) - 1:
                replaced[matrix] = shared[key].widened(factor.channels)
        del factors
        walk.advance(replaced)
    return done


def inputs(walk: BlockwiseForward, formats: Mapping[str, Format]) -> dict[str, Factor]:
    """The factored Hessian of every matrix in the walk's current block; matrices that read one input share it."""
    block = walk.block
    outputs = {matrix: output for matrix, output in block.observed.items() if matrix in formats}
    first = {output: matrix for matrix, output in reversed(outputs.items())}
    hessians = {output: Hessian(block.channels[matrix]) for output, matrix in first.items()}

    def see(matrix: str, _: int, x: np.ndarray) -> None:
        output = outputs.get(matrix)
        if output is not None and first[output] == matrix:
            hessians[output].see(x)  # at every position, for the head too: a factor needs several inputs per channel

    walk.observe(see)
    factors = {output: hessians.pop(output).factor() for output in first}
    return {matrix: factors[output] for matrix, output in outputs.items()}
