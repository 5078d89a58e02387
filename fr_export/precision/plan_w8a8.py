"""Which products of a model take 8-bit activations, and at what scale: decided from calibration statistics alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fusionroute.calibration.observers import LEVELS, Observer
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import layer
from fusionroute.fr_export.graphs.graph import Graph, users
from fusionroute.fr_export.precision.smoothquant import Columns
from fusionroute.runtime.errors import InputError

SHARE = 0.6  # of the multiply-adds of a token that must have 8-bit activations


@dataclass(frozen=True)
class Product:
    """One matrix [out, in] of a model: multiply-adds per token, and what 8-bit activations would cost it.

    `noise` is what rounding its input does to what its decoder block passes on (`residual_error`), infinite where calibration never saw the
    input. Of the LM head it is the expected squared error of a logit (to second order, KL is half of its variance).
    """

    matrix: str
    work: int
    noise: float


@dataclass(frozen=True)
class W8A8Plan:
    """`scales`: matrix → step of its input's 8-bit values. `at_a16`: the products that stay at A16, the noisiest first.

    `share`: of a token's multiply-adds, the part that is W8A8. `bits`: per weight on disk, scales included.
    """

    scales: Mapping[str, float]
    at_a16: tuple[Product, ...]
    share: float
    bits: float


def choose(
    graph: Graph,
    weights: Weights,
    observed: Mapping[str, Observer],
    measured: Mapping[str, float],
    limit: Callable[[Observer], float] = Observer.absmax,
    share: float = SHARE,
) -> W8A8Plan:
    """Choose for a graph as `smooth` returns it; `observed` (matrix → what enters it) are statistics of that graph, not of the unsmoothed one.

    `measured` gives the noise of the decoder blocks' products, `limit` the largest |x| that is kept. Products whose noise per multiply-add
    is largest stay at A16 while at least `share` of the multiply-adds are W8A8; those never seen stay in any case.
    Raises InputError where a matrix has no observer, or as `Weights.rows` does.
    """
    products = []
    limits: dict[str, float] = {}
    for name, (out, width) in matrices(graph).items():
        if not users(graph.model.graph.initializers[name])[0]:
            continue  # an embedding only
        if name not in observed:
            raise InputError(f"The calibration has no statistics of '{name}': make them again for this model.")
        limits[name] = limit(observed[name])
        if not observed[name].rows:
            costs = float("inf")
        elif layer(graph, graph.model.graph.initializers[name]) == graph.layers:
            costs = logit_noise(observed[name], limits[name], Columns.read(graph.sources[name], weights)) / out
        else:
            costs = measured[name]
        products.append(Product(name, out * width, costs))
    products.sort(key=lambda product: product.noise / product.work, reverse=True)
    total = sum(product.work for product in products)
    left = total  # multiply-adds that are W8A8
    at_a16 = []
    for product in products:
        if product.noise == np.inf or left - product.work >= share * total:
            at_a16.append(product)
            left -= product.work
    scales = {product.matrix: limits[product.matrix] / LEVELS or 1.0 for product in products if product not in at_a16}
    rows = {name: shape[0] for name, shape in matrices(graph).items()}
    values = sum(out * width for out, width in matrices(graph).values())
    return W8A8Plan(scales, tuple(at_a16), left / total, 8 + 32 * sum(rows.values()) / values)


def matrices(graph: Graph) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of every matrix that products or look-ups read."""
    shapes = {}
    for name, value in graph.model.graph.initializers.items():
        if name in graph.sources and any(users(value)) and len(value.shape) == 2:
            shapes[name] = (int(value.shape[0]), int(value.shape[1]))
    return shapes


def logit_noise(seen: Observer, limit: float, columns: Columns) -> float:
    """Expected squared error of all logits together for inputs kept up to `limit`, whose channels are taken as uncorrelated."""
    if not limit:
        return 0.0
    # the error is spread over the channels as rounding spreads it: a channel smaller than a step loses at most itself
    spread = np.minimum(seen.mean_square, (limit / LEVELS) ** 2 / 12)
    return seen.error(limit) * len(spread) * float(spread @ columns.squares) / float(spread.sum())
