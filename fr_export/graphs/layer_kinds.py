"""The decoder layers of a model by kind, so that a trace needs to see only some of each: the others equal them."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INDEX = "layer_idx"  # where transformers keeps a layer's number
PLAIN = (bool, int, float, str, list, tuple, dict, torch.dtype, partial)


class Alike(NamedTuple):
    """Layers of one kind, by number: the traced `template`, those `left_out` of a trace that equal it, and the traced
    `last` one, to check that.
    """

    template: int
    left_out: list[int]
    last: int


def alike(model: Any) -> list[Alike]:
    """The kinds of which a trace can leave out layers.

    The first layer of each is always traced and never a template: it may compute what later ones share, as masks.
    """
    kinds: dict[str, list[int]] = {}
    for number, layer in enumerate(getattr(model.model, "layers", ())):
        kinds.setdefault(kind(model.config, number, layer), []).append(number)
    return [Alike(numbers[1], numbers[2:-1], numbers[-1]) for numbers in kinds.values() if len(numbers) > 3]


def kind(config: Any, number: int, layer: nn.Module) -> str:
    """All that can set a layer apart: its modules with their attributes and the shapes of their tensors, and what lists
    of the config with one entry per layer say of it.
    """
    entries = {
        name: values[number]
        for name, values in config.to_dict().items()
        if isinstance(values, (list, tuple)) and len(values) == config.num_hidden_layers
    }
    modules = [
        (
            name,
            type(module).__qualname__,
            {key: described(value) for key, value in plain_attributes(module).items() if key != INDEX},
            [(key, tensor.shape, tensor.dtype) for key, tensor in tensors(module)],
        )
        for name, module in layer.named_modules()
    ]
    return repr((entries, modules))


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a model's code set on a module, without its tensors and modules."""
    return {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}


def tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The parameters and buffers of a module itself."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def described(value: Any) -> str:
    """Equal for equal plain values and for calls of one function; other objects equal only themselves."""
    return repr(value) if value is None or isinstance(value, PLAIN) else str(id(value))


class LeftOut(nn.Module):
    """Stands where a layer stood, with the attributes by which a model chooses its layers' arguments. Passes on the
    hidden states, in a tuple where the model's layers answer in one.
    """

    def __init__(self, layer: nn.Module, answer: Callable[[Tensor], Any]):
        super().__init__()
        self.__dict__.update(plain_attributes(layer))
        self._answer = answer

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """hidden_states [B, S, H], as they are."""
        return self._answer(hidden_states)


def leave_out(model: Any, numbers: Sequence[int]) -> None:
    """Let a model pass over some layers, the first never among them. The others keep their numbers."""
    if not numbers:
        return
    layers = model.model.layers
    in_tuple: list[bool] = []
    layers[0].register_forward_hook(lambda _, __, answer: in_tuple.append(isinstance(answer, tuple)))
    for number in numbers:
        layers[number] = LeftOut(layers[number], lambda hidden_states: (hidden_states,) if in_tuple[-1] else hidden_states)
