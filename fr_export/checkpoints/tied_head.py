"""Whether a model's head is its embedding: what the tensors say, where config.json says otherwise. As transformers 5 decides."""

from typing import Any

import torch

from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import SLICE

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NOTE = "its config.json ties the head to the embedding, but its weights have another head, which is used"


def heads_apart(config: Any, tensors: dict[str, StoredTensor]) -> bool:
    """Whether a model that its config ties has a head of its own; then `config` says so from now on.

    A head without an embedding becomes the embedding.
    """
    if not config.tie_word_embeddings or HEAD not in tensors:
        return False
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    elif not equal(tensors[EMBEDDING], tensors[HEAD]):
        config.tie_word_embeddings = False
        return True
    return False


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same values; they are read up to the first difference."""
    if one.shape != other.shape:
        return False
    rows, step = one.shape[0], max(1, SLICE // one.shape[-1])
    with one.open() as read, other.open() as read_other:
        pieces = ((start, min(start + step, rows)) for start in range(0, rows, step))
        return all(torch.equal(read(*piece), read_other(*piece)) for piece in pieces)
