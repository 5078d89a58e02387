"""What sets an expert apart from the router, where both are adapters of one base: low-rank terms, and whole vectors.

Only headers are read. A model that is the base itself is an adapter without terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.sources.low_rank import LowRankTensor
from fusionroute.fr_export.checkpoints.sources.merge_lora import EMBEDDING, HEAD
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.runtime.errors import InputError

REMEDY = "adapt one base (--base) with LoRA on the matrices of its layers, and whole norms at most, or leave --shared-base out"


@dataclass(frozen=True)
class Term:
    """scale · b·a, added to a matrix [N, K]. a [r, K], b [N, r]."""

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(frozen=True)
class Delta:
    """An expert as the router and what is added to it.

    terms: a matrix's name → their sum is what the expert's has more than the router's. vectors: the names of those that
    the expert has with other values.
    """

    terms: Mapping[str, Sequence[Term]]
    vectors: frozenset[str]

    def rank(self, matrix: str) -> int:
        """Of the sum of a matrix's terms."""
        return sum(term.a.shape[0] for term in self.terms.get(matrix, ()))


def delta_of(router: Checkpoint, expert: Checkpoint) -> Delta:
    """The expert as the router and what is added to it.

    Raises InputError, which names the expert and a tensor, where they differ by more than low-rank terms and norms.
    """
    theirs = router.weights.entries
    terms: dict[str, list[Term]] = {}
    vectors: set[str] = set()
    if router.config.tie_word_embeddings != expert.config.tie_word_embeddings:
        raise unshared(expert, f"'{HEAD}.weight' is tied to the embedding in one of the two")
    for name, tensor in expert.weights.entries.items():
        other = theirs.get(name)
        if tensor == other:
            continue
        (root, plus), (other_root, minus) = unfolded(tensor), unfolded(other)
        if root == other_root and not name.startswith((EMBEDDING, HEAD)):
            terms[name] = [*plus, *(Term(term.a, term.b, -term.scale) for term in minus)]
        elif other is not None and tensor.shape == other.shape and is_norm(name, tensor):
            vectors.add(name)
        else:
            raise unshared(expert, f"'{name}' is another, and not by low-rank factors in a layer")
    return Delta(terms, frozenset(vectors))


def unfolded(tensor: StoredTensor | None) -> tuple[StoredTensor | None, list[Term]]:
    """A tensor as one of the base and the low-rank terms on top of it."""
    terms = []
    while isinstance(tensor, LowRankTensor):
        terms.append(Term(tensor.a, tensor.b, tensor.scale))
        tensor = tensor.base
    return tensor, terms


def is_norm(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor is the weight of a norm, as all families name them."""
    return len(tensor.shape) == 1 and name.endswith("norm.weight")


def unshared(expert: Checkpoint, reason: str) -> InputError:
    """The error for an expert that cannot share the router's weights."""
    return InputError(f"{expert.where} and the router cannot share one base, since {reason}: {REMEDY}.")
