"""SmoothQuant: activation channels of uneven size are divided by scales, and the columns of the next matrix are
multiplied by them.

Xiao, Lin, Seznec, Wu, Demouth, Han 2023, arXiv:2211.10438: (X / s)·(s·W) = X·W. No operator is added: s goes into the
weights of the norm (or the rows of the matrix) that produces X and into the columns of the matrices that read it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from fusionroute.calibration.observers import LEVELS, Observer
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.source_rows import digest, rows

# operator → which input is its weight
NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
VIEWS = ("Reshape", "Transpose", "Identity", "Pad", "Slice")  # between attention and its projections
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SMALLEST = 1e-5  # of an absolute maximum: a channel that is always zero needs no scale


@dataclass(frozen=True)
class Group:
    """Matrices that read one value of K channels, and the sources whose rows produce it: source → first row.

    `share` int64 [K] names the scale of each channel, from 0: all different, but query heads share those of the value
    head they read.
    """

    matrices: tuple[str, ...]
    makers: Mapping[str, int]
    share: np.ndarray

    @property
    def scales(self) -> int:
        """Number of scales to choose."""
        return int(self.share.max()) + 1


@dataclass(frozen=True)
class Choice:
    """The α of a group, None where nothing is scaled, and its scales float32 [scales]."""

    alpha: float | None
    scale: np.ndarray


# sources, weights, matrix → what entered it, group → its scales
Choose = Callable[[Mapping[str, Source], Weights, Mapping[str, Observer], Group], Choice]


def smooth(
    graph: Graph,
    weights: Weights,
    observed: Mapping[str, Observer],
    choose: Choose,
    taken: dict[str, Choice] | None = None,
    leave: Collection[str] = (),
) -> tuple[Graph, dict[str, float | None]]:
    """The graph with scaled sources, the same function in exact arithmetic, and each matrix's α (None: left as it is).
    `graph` stays.

    `observed`: matrix → what entered it. A group is skipped if calibration saw no input of one of its matrices; for the
    others `choose` chooses: `for_tensors` or `for_blocks`, by how the products round. The final norm, which the routing
    head reads too, and a matrix that is also an embedding are never scaled. `taken` holds the scales of earlier models by
    the content of their matrices: a group with a matrix of theirs takes their scales, so that what models have in common
    stays equal. Groups of which every matrix is in `leave` stay as they are.
    """
    sources, taken = dict(graph.sources), {} if taken is None else taken
    chosen: dict[str, float | None] = {}
    for group in groups(graph):
        if not all(name in observed and observed[name].rows for name in group.matrices):
            continue
        keys = [f"{name in group.makers}-{digest(graph.sources[name], weights)}" for name in matrices_of(graph, group)]
        choice = next((taken[key] for key in keys if key in taken), None)
        if choice is None:
            left = set(group.matrices) <= set(leave)
            choice = unscaled(group) if left else choose(sources, weights, observed, group)
        taken |= {key: choice for key in keys if key not in taken}
        chosen |= dict.fromkeys(group.matrices, choice.alpha)
        if choice.alpha is not None:
            sources |= moved(graph, sources, group, choice.scale)
    return replace(graph, sources=sources), chosen


def for_tensors(
    sources: Mapping[str, Source], weights: Weights, observed: Mapping[str, Observer], group: Group, alphas: Sequence[float] = ALPHAS
) -> Choice:
    """For activations with one step per tensor and weights with one per row: the α of `alphas`, with
    s = max|X|^α / max|W|^(1−α) by channel (eq. 4), or s = 1, that makes the expected error of 8-bit products smallest
    (`expected_errors`).
    """
    seen = observed[group.matrices[0]]
    read = {name: Columns.read(sources[name], weights) for name in group.matrices}
    absmax = largest(seen.channel_absmax, group)
    weight_absmax = largest(np.max([columns.absmax for columns in read.values()], axis=0), group)
    candidates = [unscaled(group)]
    candidates += [Choice(alpha, migration(absmax, weight_absmax, alpha)) for alpha in alphas]
    by_channel = [candidate.scale[group.share] for candidate in candidates]
    errors = sum(expected_errors(sources[name], weights, columns, seen, by_channel) for name, columns in read.items())
    return candidates[int(np.argmin(errors))]


def for_blocks(sources: Mapping[str, Source], weights: Weights, observed: Mapping[str, Observer], group: Group) -> Choice:
    """For activations and weights that both have steps by block, those of the activations chosen token by token:
    s = √(rms X / rms W) by channel.

    Steps are then those of usual tokens, and not of the rare largest value. Rounding X costs step_X²·Σ(s·W)² and
    rounding W costs step_W²·Σ(X/s)²; both sums have equal terms in all channels of a block, so no channel widens the
    steps of the others.
    """
    seen = observed[group.matrices[0]]
    squares = np.sum([Columns.read(sources[name], weights).squares for name in group.matrices], axis=0)
    size, weight_size = (np.sqrt(largest(each, group)) for each in (seen.mean_square, squares))
    return Choice(0.5, migration(size, weight_size, 0.5))


def unscaled(group: Group) -> Choice:
    """Every channel as it is."""
    return Choice(None, np.ones(group.scales, np.float32))


def matrices_of(graph: Graph, group: Group) -> list[str]:
    """The matrices that a group scales, those that make its value and those that read it; no vectors, which cost
    nothing to store.
    """
    own_rows = [name for name in group.makers if len(graph.model.graph.initializers[name].shape) == 2]
    return [*group.matrices, *own_rows]


def moved(graph: Graph, sources: Mapping[str, Source], group: Group, scale: np.ndarray) -> dict[str, Source]:
    """The sources that change where a group's channels are divided by their scales, float32 [scales]."""
    changed = {name: scaled(sources[name], column_scale=scale[group.share]) for name in group.matrices}
    for name, start in group.makers.items():
        factors = np.ones(int(graph.model.graph.initializers[name].shape[0]), np.float32)
        factors[start : start + len(scale)] = 1 / scale
        changed[name] = scaled(sources[name], row_scale=factors)
    return changed


def migration(size: np.ndarray, weight_size: np.ndarray, alpha: float) -> np.ndarray:
    """s float32 [channels] by eq. 4 from the sizes of channels and of their weights; 1 where one of them is always zero."""
    scale = np.maximum(size, SMALLEST) ** alpha / np.maximum(weight_size, SMALLEST) ** (1 - alpha)
    return np.where((size > SMALLEST) & (weight_size > SMALLEST), scale, 1).astype(np.float32)


@dataclass(frozen=True)
class Columns:
    """The input columns of a matrix [out, K]: largest |w| float32 [K], sum of squares float64 [K]."""

    absmax: np.ndarray
    squares: np.ndarray

    @classmethod
    def read(cls, source: Source, weights: Weights) -> "Columns":
        """Read slice by slice. Raises InputError as `Weights.rows` does."""
        absmax, squares = np.zeros(1, np.float32), np.zeros(1)
        for part in rows(source, weights):
            absmax = np.maximum(absmax, np.abs(part).max(axis=0))
            squares = squares + np.einsum("ij,ij->j", part, part, dtype=np.float64)
        return cls(absmax, squares)


def expected_errors(source: Source, weights: Weights, columns: Columns, seen: Observer, scales: Sequence[np.ndarray]) -> np.ndarray:
    """Expected squared error of a W8A8 product, relative to its squared size, for each of M scales [K]: float64 [M].

    Channels are taken as uncorrelated. Rounding to a step d costs d²/12 per value, or all of x² where a channel is
    smaller than that; the activations' step is that of their absolute maximum, and each row of weights has its own.
    """
    signal = float(seen.mean_square @ columns.squares) or 1.0
    steps = np.zeros(len(scales))  # Σ over rows of the weights' squared step
    for part in rows(source, weights):
        size = np.abs(part)
        for number, scale in enumerate(scales):
            steps[number] += np.square((size * scale).max(axis=1, initial=0) / LEVELS, dtype=np.float64).sum()
    errors = np.empty(len(scales))
    for number, scale in enumerate(scales):
        square = seen.mean_square / np.square(scale, dtype=np.float64)
        step = float((seen.channel_absmax / scale).max()) / LEVELS
        rounding = np.minimum(square, step**2 / 12) @ (columns.squares * np.square(scale, dtype=np.float64))
        errors[number] = (rounding + steps[number] / 12 * square.sum()) / signal
    return errors


def scaled(source: Source, row_scale: np.ndarray | None = None, column_scale: np.ndarray | None = None) -> Source:
    """A source whose rows or columns are multiplied by float32 factors, on top of those it has."""

    def product(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return one if other is None else other if one is None else one * other

    return replace(source, row_scale=product(source.row_scale, row_scale), column_scale=product(source.column_scale, column_scale))


def largest(channels: np.ndarray, group: Group) -> np.ndarray:
    """The largest of the channels [K] that share a scale, for each scale."""
    maxima = np.zeros(group.scales, np.float32)
    np.maximum.at(maxima, group.share, channels)
    return maxima


def groups(graph: Graph) -> list[Group]:
    """Every place in a graph where a scale can move. Groups that change a matrix's rows come first, so that its columns
    are read afterwards.
    """
    inner = graph.model.graph
    places: list[Group] = []
    for value in dict.fromkeys(n.inputs[0] for n in inner if n.op_type == "FusedMatMul"):
        users = list(value.consumers())
        if value in inner.outputs or not all(n.op_type == "FusedMatMul" and alone(graph, n.inputs[1]) for n in users):
            continue
        if made_by := makers(graph, value):
            rows_made, share = made_by
            places.append(Group(tuple(n.inputs[1].name for n in users), rows_made, share))
    return sorted(places, key=lambda group: all(len(inner.initializers[name].shape) == 1 for name in group.makers))


def makers(graph: Graph, value: ir.Value) -> tuple[dict[str, int], np.ndarray] | None:
    """The sources whose rows make a value's channels, and which rows share a scale. None where no scale can pass."""
    width = int(next(iter(value.consumers())).inputs[1].shape[1])
    maker = value.producer()
    if maker is None:
        return None
    if maker.op_type in NORMS:
        weight = maker.inputs[NORMS[maker.op_type]]
        return ({weight.name: 0}, np.arange(width)) if value is maker.outputs[0] and alone(graph, weight) else None
    if maker.op_type == "Mul":  # act(gate)·up: linear in up
        factor = next((rows_made for operand in maker.inputs if (rows_made := linear(graph, operand))), None)
        return (factor, np.arange(width)) if factor else None
    attention = unviewed(value).producer()
    if attention is not None and attention.op_type == "GroupQueryAttention":
        heads, kv_heads = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        factor = linear(graph, attention.inputs[2] or attention.inputs[0])
        if factor is None:
            return None
        size = width // heads
        if attention.inputs[2] is None:  # values are the last rows of packed projections
            factor = {name: int(graph.model.graph.initializers[name].shape[0]) - kv_heads * size for name in factor}
        head, place = np.divmod(np.arange(width), size)
        share = head // (heads // kv_heads) * size + place
        return factor, share
    return None


def linear(graph: Graph, value: ir.Value) -> dict[str, int] | None:
    """The matrix whose product a value is, or is a part of, and the bias added to it: source → first row. None where it
    is something else or is used elsewhere too.
    """
    value = unviewed(value)
    maker = value.producer()
    if maker is None or len(value.consumers()) != 1:
        return None
    if maker.op_type == "Split":
        before = sum(int(part.shape[-1]) for part in maker.outputs[: maker.outputs.index(value)])
        whole = linear(graph, maker.inputs[0])
        return {name: start + before for name, start in whole.items()} if whole else None
    if maker.op_type == "Add" and alone(graph, maker.inputs[1]):
        below = linear(graph, maker.inputs[0])
        return below | {maker.inputs[1].name: 0} if below else None
    return {maker.inputs[1].name: 0} if maker.op_type == "FusedMatMul" and alone(graph, maker.inputs[1]) else None


def unviewed(value: ir.Value) -> ir.Value:
    """The value that views show."""
    while (maker := value.producer()) is not None and maker.op_type in VIEWS and len(value.consumers()) == 1:
        value = maker.inputs[0]
    return value


def alone(graph: Graph, weight: ir.Value) -> bool:
    """Whether a value is a weight that one operator reads: a tied embedding is not."""
    return bool(graph.sources.get(weight.name, Source()).tensors) and len(weight.consumers()) == 1
