"""GPTQ for a whole model: its matrices are rounded in order while the calibration texts pass through it.

Each is rounded on the inputs that the rounded ones before it give, so that errors do not accumulate. Where several models
read the rounded matrices, the inputs of all of them count.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.block import Block
from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.fr_export.graphs.decoder_blocks import reader
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.source_rows import counted, digest, rows, unscaled
from fusionroute.fr_export.graphs.stages import stages
from fusionroute.fr_export.graphs.weight_store import Store
from fusionroute.fr_export.precision.blockwise import Format, Stored, attach, in_range, sliced, store_blocks
from fusionroute.fr_export.precision.fit_context import FitContext
from fusionroute.fr_export.precision.gptq import Factor, Hessian, quantise
from fusionroute.fr_export.precision.kept_matrices import KeptModel, graph_digest, stamps
from fusionroute.fr_export.precision.products import multiply
from fusionroute.fr_export.precision.scheme import Scheme

TOKENS = 2048  # added to a Hessian at a time

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

    Those that `context.kept` holds of an export that was ended are taken over. Where it holds all, no text is read.
    Memory: the matrices that read one value in fp32 twice, their Hessian, and the states of all texts of all models. Raises
    InputError as `Weights` and `BlockwiseForward` do.
    """
    if not context.evidence.texts:
        return {}
    blocks = stages(context.graph)
    order = [matrix for block in blocks for matrix in block.observed if matrix in formats]
    earlier = KeptModel(None, 0) if context.kept is None else context.kept.of(dependencies(context, formats))
    done = taken_over(context, formats, order, earlier)
    if len(done) == len(order):
        return done
    (walk, read), *sharing = walks(context, blocks)
    while not walk.done:
        factor = cache(lambda: hessian(walk, *(other for other, _ in sharing)).factor())  # all matrices of a stage read one value

        def rounded(matrix: str, factor: Callable[[], Factor] = factor) -> Stored:
            fmt = formats[matrix]
            whole = in_range(rows(context.graph.sources[matrix], context.weights), fmt, matrix)
            pieces = counted(sliced(whole, factor().channels), context.advance)
            stored = store_blocks((quantise(piece, factor(), fmt, context.threads) for piece in pieces), fmt, context.store, matrix)
            earlier.keep(matrix, stored)
            return stored

        replaced = {}
        for matrix in walk.block.observed:
            if matrix not in formats:
                continue
            if matrix not in done:
                done[matrix] = settled(context, matrix, formats[matrix], rounded)
            if walk.position < len(walk.blocks) - 1:
                replaced[matrix] = done[matrix].widened(walk.block.channels[matrix])
        walk.advance(replaced)
        for other, own in sharing:
            other.advance({matrix: values + (own(matrix) - read(matrix)) for matrix, values in replaced.items()})
    return done


def settled(context: FitContext, matrix: str, fmt: Format, make: Callable[[str], Stored]) -> Stored:
    """A matrix as an earlier model has stored it, or as `make` does."""
    source, shared = context.graph.sources[matrix], context.shared
    content = digest(unscaled(source), context.weights)
    shared.await_matrix(context.number, content)
    key = f"{fmt.bits}-{fmt.block}-{fmt.signed}-{digest(source, context.weights)}"
    if key not in shared.stored:
        shared.stored[key] = make(matrix)
    shared.settle_matrix(context.number, content)
    return shared.stored[key]


def taken_over(context: FitContext, formats: Mapping[str, Format], order: Sequence[str], kept: KeptModel) -> dict[str, Stored]:
    """The first matrices of `order`, up to one that neither `kept` nor an earlier model has."""
    done: dict[str, Stored] = {}
    count = 0

    def take(matrix: str) -> Stored:
        nonlocal count
        stored = kept.take(matrix, formats[matrix], context.store, matrix)
        if stored is None:
            raise LookupError(matrix)
        context.advance(int(np.prod(context.graph.model.graph.initializers[matrix].shape)))
        count += 1
        return stored

    with suppress(LookupError):
        for matrix in order:
            done[matrix] = settled(context, matrix, formats[matrix], take)
    if count:
        context.note(f"{count} of {len(order)} matrices")
    return done


def dependencies(context: FitContext, formats: Mapping[str, Format]) -> dict[str, object]:
    """All that rounded matrices depend on but for this program: the model, how it is rounded, and the texts of all that
    read the matrices.
    """
    readers = [(context.weights, context.evidence), *context.evidence.sharing]
    return {
        "graph": graph_digest(context.graph),
        "files": [stamps(weights.files) for weights, _ in readers],
        "texts": [[hashlib.sha256(np.ascontiguousarray(text, np.int32).data).hexdigest() for text in known.texts] for _, known in readers],
        "matrices": {
            name: [fmt.bits, fmt.block, fmt.signed, fmt.zeros, str(fmt.scale_type), digest(context.graph.sources[name], context.weights)]
            for name, fmt in formats.items()
        },
        "threads": context.threads,
    }


def walks(context: FitContext, cut: Sequence[Block]) -> list[tuple[BlockwiseForward, Callable[[str], np.ndarray]]]:
    """The model on its texts, then those that share its matrices on theirs, where they have some; and what reads the
    weights of each. `cut`: the stages of the graph.
    """
    every = []
    for weights, known in ((context.weights, context.evidence), *context.evidence.sharing):
        if known.texts:
            embed, read = reader(context.graph, weights)
            every.append((BlockwiseForward(cut, known.texts, embed, read, context.threads, multiply=multiply), read))
    return every


def hessian(*walks: BlockwiseForward) -> Hessian:
    """The Hessian of the value that enters the current stage of all walks, at every position, for the head too: a factor
    needs several inputs per channel.
    """
    block = walks[0].block
    first = next(iter(block.observed))
    total, waiting = Hessian(block.channels[first]), []

    def see(matrix: str, _: int, x: np.ndarray) -> None:
        if matrix == first:
            waiting.append(x)
        if sum(map(len, waiting)) >= TOKENS:
            total.see(np.concatenate(waiting))
            waiting.clear()

    for walk in walks:
        walk.observe(see)
    if waiting:
        total.see(np.concatenate(waiting))
    return total
