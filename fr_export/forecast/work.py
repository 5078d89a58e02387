"""How much there is to do in an export, counted from headers and configs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.deltas import Delta
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.graphs.trace import architecture
from fusionroute.fr_export.precision.calibrate import NEW_TOKENS, RANDOM_PROMPT


@dataclass(frozen=True)
class Work:
    """Counts of a system: its `models`, the `values` of all, those `written` by each variant, those `recorded` with,
    `largest_model` of one, `largest_tensor` and `widest` (input channels) of one matrix. `decomposed`: for each matrix that
    is approximated, its values times its rows or columns, whichever are fewer. `traced_layers`: of all architectures, each once. `layers`
    and `active_values`: of the router and the
    largest expert, which a generated token passes. Of the calibration: `new_tokens`, and `tokens` with the prompts.
    """

    models: int
    values: int
    written: int
    recorded: int
    largest_model: int
    largest_tensor: int
    widest: int
    decomposed: int
    traced_layers: int
    layers: int
    active_values: int
    vocab_size: int
    new_tokens: int
    tokens: int

    @classmethod
    def of(cls, system: System, prompts: Sequence[str], deltas: Mapping[str, Delta]) -> "Work":
        """Count a system that is calibrated on prompts; without prompts there is no text.

        `deltas`: of the experts of which variants write factors, which are small.
        """
        exact = {name for name, delta in deltas.items() if not delta.matrices}
        sizes = [parameters(model) for model in system.models]
        shapes = [entry.shape for model in system.models for entry in model.weights.entries.values()]
        architectures = {architecture(model.config, system.vocab_size): int(model.config.num_hidden_layers) for model in system.models}
        new_tokens = len(prompts) * min(NEW_TOKENS, system.max_seq_len // 2)
        return cls(
            models=len(system.models),
            values=sum(sizes),
            written=sum(size for model, size in zip(system.models, sizes, strict=True) if model.name not in deltas),
            recorded=sum(size for model, size in zip(system.models, sizes, strict=True) if model.name not in exact),
            largest_model=max(sizes),
            largest_tensor=max(int(np.prod(shape)) for shape in shapes),
            widest=max(shape[-1] for shape in shapes if len(shape) > 1),
            decomposed=sum(decomposed(system.router, delta.matrices) for delta in deltas.values()),
            traced_layers=sum(architectures.values()),
            layers=int(system.router.config.num_hidden_layers) + max(int(one.config.num_hidden_layers) for one in system.experts),
            active_values=sizes[0] + max(sizes[1:]),
            vocab_size=system.vocab_size,
            new_tokens=new_tokens,
            tokens=new_tokens + prompt_tokens(system, prompts),
        )


def parameters(model: Checkpoint) -> int:
    """Values of a checkpoint's tensors."""
    return sum(int(np.prod(entry.shape)) for entry in model.weights.entries.values())


def decomposed(model: Checkpoint, matrices: Collection[str]) -> int:
    """Values times the smaller side, of some matrices."""
    shapes = [model.weights.entries[name].shape for name in matrices]
    return sum(int(np.prod(shape)) * min(shape) for shape in shapes)


def prompt_tokens(system: System, prompts: Sequence[str]) -> int:
    """Tokens of all prompts."""
    tokenizer = system.router.tokenizer
    return len(prompts) * RANDOM_PROMPT if tokenizer is None else sum(len(tokenizer.encode(prompt).ids) for prompt in prompts)
