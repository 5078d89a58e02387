"""What sets an expert apart from the router: low-rank terms where both are adapters of one base, whole vectors, and
matrices that have become others.

A model that is the base itself is an adapter without terms. Values are read only to tell whether a whole model is a
copy of the base.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources.low_rank import ROWS, LowRankTensor, MergedTensor
from fusionroute.fr_export.checkpoints.sources.merge_lora import EMBEDDING, HEAD
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.runtime.errors import InputError

REMEDY = (
    "approximate full fine-tunes with --rank or --delta-bits, make all models LoRA adapters of one base (--base) that train the "
    "matrices of its layers, its norms and biases at most, or leave --shared-base out"
)


@dataclass(frozen=True)
class Term:
    """scale · b·a, added to a matrix [N, K]. a [r, K], b [N, r]."""

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(frozen=True)
class Delta:
    """An expert as the router and what is added to it.

    terms: a matrix's name → their sum is what the expert's has more than the router's. vectors: the names of norms and
    biases that the expert has with other values. matrices: of those that no terms turn into the expert's, as after a
    full fine-tune.
    """

    terms: Mapping[str, Sequence[Term]]
    vectors: frozenset[str]
    matrices: frozenset[str] = frozenset()

    def rank(self, matrix: str) -> int:
        """Of the sum of a matrix's terms."""
        return sum(term.a.shape[0] for term in self.terms.get(matrix, ()))

    @property
    def values(self) -> int:
        """How many values all factors have."""
        return sum(part.shape[0] * part.shape[1] for terms in self.terms.values() for term in terms for part in (term.a, term.b))


def delta_of(router: Checkpoint, expert: Checkpoint, approximate: bool = False) -> Delta:
    """The expert as the router and what is added to it. `approximate`: matrices may be others.

    Raises InputError, which names the expert and a tensor, where they differ by more, or by sizes.
    """
    theirs = router.weights.entries
    terms: dict[str, list[Term]] = {}
    vectors: set[str] = set()
    matrices: set[str] = set()
    if router.config.tie_word_embeddings != expert.config.tie_word_embeddings:
        raise unshared(expert, f"'{HEAD}.weight' is tied to the embedding in one of the two")
    for name, tensor in expert.weights.entries.items():
        other = theirs.get(name)
        if other is None or tensor.shape != other.shape:
            raise unshared(expert, f"the router has no '{name}' of shape {list(tensor.shape)}")
        (root, plus), (other_root, minus) = unfolded(tensor), unfolded(other)
        if tensor == other or (not plus and not minus and equal(root, other_root)):
            continue
        if (plus or minus) and not name.startswith((EMBEDDING, HEAD)) and equal(root, other_root):
            terms[name] = [*plus, *(Term(term.a, term.b, -term.scale) for term in minus)]
        elif len(tensor.shape) == 1:
            vectors.add(name)
        elif approximate:
            matrices.add(name)
        else:
            raise unshared(
                expert, f"they have a '{name}' each, {change(tensor, other):.2g} of its size apart, which no low-rank factors undo exactly"
            )
    return Delta(terms, frozenset(vectors), frozenset(matrices))


def change(tensor: StoredTensor, other: StoredTensor) -> float:
    """How large the difference from another tensor is, as a multiple of that one's size: ‖W − W'‖ / ‖W'‖."""
    apart = size = 0.0
    with tensor.open() as rows, other.open() as other_rows:
        for start in range(0, tensor.shape[0], ROWS):
            stop = min(start + ROWS, tensor.shape[0])
            theirs = other_rows(start, stop).double()
            apart += float((rows(start, stop).double() - theirs).square().sum())
            size += float(theirs.square().sum())
    return math.sqrt(apart / size) if size else math.inf


def unfolded(tensor: StoredTensor) -> tuple[StoredTensor, list[Term]]:
    """A tensor as one of the base and the low-rank terms on top of it."""
    terms = []
    while isinstance(tensor, LowRankTensor):
        terms.append(Term(tensor.a, tensor.b, tensor.scale))
        tensor = tensor.base
    return tensor, terms


def equal(tensor: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of a base are one, or copies. The first rows that differ end the reading."""
    if tensor == other:
        return True
    if isinstance(tensor, MergedTensor) or isinstance(other, MergedTensor) or tensor.dtype != other.dtype or not tensor.shape:
        return False
    with tensor.open() as rows, other.open() as other_rows:
        count = tensor.shape[0]
        pieces = ((start, min(start + ROWS, count)) for start in range(0, count, ROWS))
        return all(torch.equal(rows(*piece), other_rows(*piece)) for piece in pieces)


def unshared(expert: Checkpoint, reason: str) -> InputError:
    """The error for an expert that cannot share the router's weights."""
    return InputError(f"{expert.where} and the router cannot share one base, since {reason}: {REMEDY}.")
