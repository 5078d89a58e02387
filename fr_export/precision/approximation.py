"""The low-rank factors that bring a base closest to a full fine-tune of it, on the inputs that the fine-tune's matrices
see.

For W, the expert's matrix [N, K], and Q, the base's as it is read, ‖(W − Q − B·A)·X‖ is smallest over the inputs X where
B·A·L is the truncated SVD of (W − Q)·L, with L the Cholesky factor of X·Xᵀ (SVD-LLM, arXiv:2403.07378). With the left
singular vectors U that is B = U and A = Uᵀ·(W − Q), so L need not be inverted, and factors of full rank are exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusionroute.calibration.blockwise_forward import BlockwiseForward
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.weights import Weights
from fusionroute.fr_export.graphs.decoder_blocks import embedding, matrices, reader
from fusionroute.fr_export.graphs.factor_arrays import LowRank
from fusionroute.fr_export.graphs.factors import LOOKUP
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.fr_export.graphs.stages import stages
from fusionroute.fr_export.precision.gptq import DAMPING
from fusionroute.fr_export.precision.gptq_sequential import hessian
from fusionroute.fr_export.precision.products import coarse_products, multiply

Base = Callable[[str], np.ndarray]  # matrix → the base's float32 [N, K], without the scales of its source


@dataclass(frozen=True)
class Change:
    """What some matrices that read one value x have changed by.

    differences, wholes: name of the factors → W − Q and W, float32 [N, K]. root: L as above, float32 [K, K]; [K] where
    it is diagonal; None where nothing is known of x.
    """

    differences: Mapping[str, torch.Tensor]
    wholes: Mapping[str, torch.Tensor]
    root: torch.Tensor | None

    def weighted(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix · L."""
        if self.root is None:
            return matrix
        return matrix * self.root if self.root.ndim == 1 else matrix @ self.root


@dataclass(frozen=True)
class Spectrum:
    """What further ranks gain for matrices of one `Change`, all of one rank.

    gains float64 [R]: falling, by how much each rank lowers the squared error of the products, as a share of their
    squared size (summed over the matrices). values: that a rank adds to the factors.
    """

    names: Sequence[str]
    gains: np.ndarray
    values: int


@dataclass(frozen=True)
class ChangedExpert:
    """An expert whose matrices have become others: its trace in the `ort` dialect, its weights, and the `texts` that it
    reads (token ids int32 [S] each; none where they are not known). products, lookups: the matrices that changed.
    """

    graph: Graph
    weights: Weights
    texts: Sequence[np.ndarray]
    products: frozenset[str]
    lookups: frozenset[str]

    @classmethod
    def of(cls, graph: Graph, weights: Weights, texts: Sequence[np.ndarray], delta: Delta) -> "ChangedExpert":
        """By what the delta says of its tensors."""
        changed = {name for name, source in graph.sources.items() if delta.matrices.intersection(source.tensors)}
        table = embedding(graph).inputs[0].name
        return cls(graph, weights, texts, frozenset(changed & matrices(graph).keys()), frozenset(changed & {table}))

    def changes(self, base: Base) -> Iterator[Change]:
        """What has changed, the embedding first, then in the order in which the model computes. Memory as `hessian`'s."""
        embed, read = reader(self.graph, self.weights)
        for table in self.lookups:
            mine, theirs = (torch.from_numpy(source(table)).T for source in (read, base))
            yield Change({table + LOOKUP: mine - theirs}, {table + LOOKUP: mine}, self._frequencies(mine.shape[1]))
        cut = stages(self.graph)
        walk = BlockwiseForward(cut, self.texts, embed, read, multiply=multiply) if self.texts else None
        for stage in cut:
            if names := [name for name in stage.observed if name in self.products]:
                with coarse_products():
                    root = hessian(walk).root() if walk is not None else None
                wholes = {name: torch.from_numpy(read(name)) for name in names}
                yield Change({name: whole - torch.from_numpy(base(name)) for name, whole in wholes.items()}, wholes, root)
            if walk is not None and stage is not cut[-1]:
                with coarse_products():
                    walk.advance()

    def _frequencies(self, vocabulary: int) -> torch.Tensor | None:
        """How often each token is looked up: L of the one-hot vectors, damped."""
        if not self.texts:
            return None
        counts = torch.bincount(torch.from_numpy(np.concatenate(self.texts).astype(np.int64)), minlength=vocabulary).float()
        return (counts + DAMPING * counts.mean()).sqrt()


def spectra(expert: ChangedExpert, base: Base, advance: Callable[[int], None]) -> Iterator[Spectrum]:
    """Of all that has changed. `advance(n)` is told of every n values done."""
    for change in expert.changes(base):
        yield spectrum_of(change)
        advance(sum(difference.numel() for difference in change.differences.values()))


def spectrum_of(change: Change) -> Spectrum:
    """What the ranks of a change gain."""
    gains = []
    for name, difference in change.differences.items():
        size = float(change.weighted(change.wholes[name]).double().square().sum())
        gains.append((torch.linalg.svdvals(change.weighted(difference)).double().square() / size).numpy())
    longest = max(map(len, gains))
    return Spectrum(
        tuple(change.differences),
        np.sum([np.pad(each, (0, longest - len(each))) for each in gains], axis=0),
        sum(sum(difference.shape) for difference in change.differences.values()),
    )


def approximate(expert: ChangedExpert, base: Base, ranks: Mapping[str, int], advance: Callable[[int], None]) -> dict[str, LowRank]:
    """The factors of so many ranks, by their names. `advance` as for `spectra`."""
    factors = {}
    for change in expert.changes(base):
        for name, difference in change.differences.items():
            left = torch.linalg.svd(change.weighted(difference), full_matrices=False)[0][:, : ranks[name]]
            factors[name] = LowRank((left.T @ difference).T.numpy(), left.T.contiguous().numpy())
            advance(difference.numel())
    return factors
