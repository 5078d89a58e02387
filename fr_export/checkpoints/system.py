"""A FusionRoute system: a router with its routing head and the experts it chooses from, checked to belong together."""

from dataclasses import dataclass

import numpy as np

from fusionroute.fr_export.checkpoints.checkpoint import HEAD_FILE, Checkpoint
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.families.family import positions
from fusionroute.runtime.errors import InputError

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class RoutingHead:
    """The linear map from the router's final hidden state to one score per expert (FusionRoute, w = W·h)."""

    weight: np.ndarray  # float32 [n_experts, hidden]
    bias: np.ndarray  # float32 [n_experts]


@dataclass(frozen=True)
class System:
    """Router, experts (in the order of the head's rows), and what they share."""

    router: Checkpoint
    experts: tuple[Checkpoint, ...]
    head: RoutingHead
    vocab_size: int
    max_seq_len: int

    @property
    def family(self) -> Family:
        """The router's family. Experts may be of others, as long as vocabularies agree."""
        return self.router.family

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """The router first, then the experts."""
        return (self.router, *self.experts)

    @classmethod
    def open(
        cls,
        family: Family | None,
        router: str,
        experts: dict[str, str],
        head_key: str = "routing_head",
        max_seq_len: int | None = None,
        base: str | None = None,
    ) -> "System":
        """Open and check all checkpoints. Raises InputError on the first thing that does not fit.

        `family` is the router's; None takes the one that its config names. `base` is that of all adapters; None takes
        the one that each names.
        """
        if not experts:
            raise InputError("A system needs at least one expert: name it with --expert NAME=SRC.")
        router_checkpoint = Checkpoint.open("router", router, family, head_key, base)
        expert_checkpoints = tuple(Checkpoint.open(name, source, base=base) for name, source in experts.items())
        models = (router_checkpoint, *expert_checkpoints)
        if base is not None and all(model.source.kind != "adapter" for model in models):
            raise InputError(f"--base {base} is for adapters, and all models of this system are whole ones: leave --base out.")
        vocab_size = common_vocabulary(router_checkpoint, expert_checkpoints)
        check_ends(router_checkpoint, vocab_size)
        return cls(
            router=router_checkpoint,
            experts=expert_checkpoints,
            head=read_head(router_checkpoint, head_key, list(experts)),
            vocab_size=vocab_size,
            max_seq_len=context(models, max_seq_len),
        )


def read_head(router: Checkpoint, key: str, names: list[str]) -> RoutingHead:
    """The routing head, from the router's own safetensors or from routing_head.safetensors beside them.

    Raises InputError where it is missing or has another shape than the experts `names` and the router need.
    """
    if f"{key}.weight" not in router.weights:
        raise InputError(
            f"{router.where} has no tensor '{key}.weight': put it into its safetensors or into {HEAD_FILE} beside them, or name its key with --routing-head-key."
        )
    expected = (len(names), router.config.hidden_size)
    if (shape := router.weights.shape(f"{key}.weight")) != expected:
        raise InputError(
            f"{router.where} has a routing head of shape {list(shape)}; {len(names)} expert(s) ({', '.join(names)}) and hidden size "
            f"{expected[1]} need {list(expected)}: name as many experts as the head was trained for, in its order."
        )
    biased = f"{key}.bias" in router.weights
    if biased and (shape := router.weights.shape(f"{key}.bias")) != expected[:1]:
        raise InputError(f"{router.where} has a routing bias of shape {list(shape)}; expected {[len(names)]}, one value per expert.")
    bias = router.weights.read(f"{key}.bias") if biased else np.zeros(len(names), np.float32)
    return RoutingHead(router.weights.read(f"{key}.weight"), bias)


def common_vocabulary(router: Checkpoint, experts: tuple[Checkpoint, ...]) -> int:
    """The vocabulary size that all models share. Padded embeddings are cut to the smallest one.

    Raises InputError where vocabularies or special tokens differ: fused logits would mix different tokens.
    """
    for expert in experts:
        if (router.vocabulary is None) != (expert.vocabulary is None):
            lacking = expert if expert.vocabulary is None else router
            raise InputError(
                f"{lacking.where} has no tokenizer.json while others of the system have one; copy the tokenizer they share into it."
            )
        if router.vocabulary is not None and expert.vocabulary is not None and router.vocabulary != expert.vocabulary:
            differing = len(router.vocabulary.items() ^ expert.vocabulary.items())
            raise InputError(
                f"{expert.where} has another vocabulary than the router ({len(expert.vocabulary)} and {len(router.vocabulary)} tokens, "
                f"{differing} entries differ); fusion needs equal vocabularies: use experts fine-tuned from the router's family and size of vocabulary."
            )
        if router.special_tokens != expert.special_tokens:
            names = sorted({name for name, _ in router.special_tokens.items() ^ expert.special_tokens.items()})
            raise InputError(f"{expert.where} differs from the router in the special tokens {', '.join(names)}; fusion needs them equal.")
    sizes = {model.config.vocab_size for model in (router, *experts)}
    smallest = min((router, *experts), key=lambda model: model.config.vocab_size)
    if router.vocabulary is None:
        if len(sizes) > 1:
            raise InputError(
                f"Router and experts have vocabularies of {sorted(sizes)} tokens and no tokenizer that tells which are padding; fusion needs equal ones."
            )
        return int(sizes.pop())
    needed = max(router.vocabulary.values()) + 1
    if min(sizes) < needed:
        raise InputError(
            f"{smallest.where} embeds {min(sizes)} tokens, but its tokenizer numbers {needed}; copy the tokenizer that belongs to the model."
        )
    return int(min(sizes))


def check_ends(router: Checkpoint, vocab_size: int) -> None:
    """Raise InputError for a token that should end texts and that is never chosen."""
    if wrong := [end for end in router.end_tokens if not 0 <= end < vocab_size]:
        raise InputError(
            f"{router.where} ends texts with token {wrong[0]}, which is outside the vocabulary of {vocab_size}: correct eos_token_id in its "
            "config.json or generation_config.json."
        )


def context(models: tuple[Checkpoint, ...], max_seq_len: int | None) -> int:
    """KV capacity in tokens: the given one, else the smallest of 4096 and the models' own context lengths.

    Raises InputError where a model was trained for fewer positions.
    """
    shortest = min(models, key=lambda model: positions(model.config))
    limit = positions(shortest.config)
    if max_seq_len is None:
        return min(DEFAULT_CONTEXT, limit)
    if not 2 <= max_seq_len <= limit:
        beyond = "; beyond them its longrope takes other rotary frequencies" if limit < shortest.config.max_position_embeddings else ""
        raise InputError(f"--max-seq-len {max_seq_len} does not fit: {shortest.where} was trained for 2 to {limit} positions{beyond}.")
    return max_seq_len
