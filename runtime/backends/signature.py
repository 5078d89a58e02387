"""What graphs take and give, by name, element type and shape: buffers are bound by address, so that a graph of another
signature would read and write beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fusionroute.runtime.limits import DELTA, WINDOW, numbered

if TYPE_CHECKING:
    from fusionroute.runtime.manifest import Model
    from fusionroute.runtime.window import Window

FLOAT, INT32, INT64 = ("tensor(float)",), ("tensor(int32)",), ("tensor(int64)",)
WIDTHS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")  # of caches and factors


class Value(NamedTuple):
    """The element types that an input or output may have, as ONNX Runtime names them, and its shape; None: any size."""

    types: tuple[str, ...]
    shape: tuple[int | None, ...]


class CacheValue(NamedTuple):
    """What a cache holds: the element types that it may have, and how many values lie in each element."""

    types: tuple[str, ...]
    packed: int = 1


Values = Mapping[str, Value]


class Signature(NamedTuple):
    """All inputs of a graph, and the outputs that are read."""

    inputs: Values
    outputs: Values

    def misfit(self, session: Any) -> str | None:
        """What does not fit in a session's graph, such as `the input k`; None: all fits."""
        given = {value.name: value for value in session.get_inputs()}
        returned = {value.name: value for value in session.get_outputs()}
        for kind, expected, actual in (("input", self.inputs, given), ("output", self.outputs, returned)):
            for name, value in expected.items():
                if name not in actual or actual[name].type not in value.types or not fits(actual[name].shape, value.shape):
                    return f"the {kind} {name}"
        return next((f"the input {name}" for name in given if name not in self.inputs), None)


def fits(shape: list[int | str | None], expected: tuple[int | None, ...]) -> bool:
    """Whether a graph's shape, whose dimensions may have names instead of sizes, admits the expected one."""
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(not isinstance(size, int) or want is None or size == want for size, want in pairs)


FLOATS, HALVES = CacheValue(FLOAT), CacheValue(WIDTHS)
ORT_LENGTHS = {"seqlens_k": Value(INT32, (1,)), "total_sequence_length": Value(INT32, ())}
WINDOW_LENGTHS = {f"{WINDOW}{name}": value for name, value in ORT_LENGTHS.items()}
TENSORRT_LENGTHS = {"write_index": Value(INT64, (1,)), "key_positions": Value(INT64, (None,))}


def of_model(
    spec: Model, capacity: int, result: tuple[str, int], experts: int, lengths: Values = ORT_LENGTHS, caches: CacheValue = FLOATS
) -> Signature:
    """Of a language model. result: the name and width of its answer. experts: how many a router scores, else 0.

    lengths: the inputs that tell how long the text is. caches: what keys and values are stored as.
    """
    text = {"input_ids": Value(INT64, (1, None)), "logit_positions": Value(INT64, (None,))}
    past, present = (keys_values(spec, capacity, when, caches) for when in ("past", "present"))
    answers = {result[0]: Value(FLOAT, (1, None, result[1]))} | ({"routing": Value(FLOAT, (1, None, experts))} if experts else {})
    return Signature(text | dict(lengths) | past, answers | present)


def lengths_of(window: Window | None) -> Values:
    """The inputs that tell how long a text is, of a model on the CPU and of its layers with a sliding window."""
    return ORT_LENGTHS if window is None else {**ORT_LENGTHS, **WINDOW_LENGTHS}


def keys_values(spec: Model, capacity: int, when: str, caches: CacheValue) -> dict[str, Value]:
    """The caches of all layers."""
    value = Value(caches.types, (1, spec.kv_heads, capacity, spec.head_size // caches.packed))
    return {f"{when}.{layer}.{kind}": value for layer in range(spec.layers) for kind in ("key", "value")}


def of_pair(own: Signature, prefix: str, factors: Values) -> Signature:
    """Of a graph that reads a second segment, of an expert, with inputs and caches whose names have a prefix."""
    shared = ("input_ids", "logit_positions")
    inputs = {prefix + name: value for name, value in own.inputs.items() if name not in shared}
    outputs = {prefix + name: value for name, value in own.outputs.items() if name.startswith("present.")}
    return Signature({**own.inputs, **inputs, "segments": Value(INT64, (2,)), **factors}, {**own.outputs, **outputs})


def of_experts(own: Signature, prefix: str, factors: Values, experts: int) -> Signature:
    """Of a graph with a segment for each of several experts, and one of padding; see `numbered`."""
    pair = of_pair(own, prefix, factors)
    inputs, outputs = ({name: value for name, value in kind.items() if name.startswith((prefix, DELTA))} for kind in pair)
    each = [{numbered(number, name): value for number in range(experts) for name, value in kind.items()} for kind in (inputs, outputs)]
    return Signature({**own.inputs, "segments": Value(INT64, (experts + 2,)), **each[0]}, {**own.outputs, **each[1]})


def of_head(width: int, vocab: int) -> Signature:
    """Of a head that stands apart."""
    return Signature({"hidden": Value(FLOAT, (1, None, width))}, {"logits": Value(FLOAT, (1, None, vocab))})


def of_fusion(vocab: int) -> Signature:
    """Of the fusion graph."""
    logits, candidates, row = Value(FLOAT, (None, vocab)), Value(FLOAT, (None, None)), Value(FLOAT, (None,))
    number = Value(FLOAT, ())
    return Signature(
        {
            "router_logits": logits, "expert_logits": logits, "coefficients": Value(FLOAT, (2,)), "penalty_ids": Value(INT64, (None, None)),
            "penalty": number, "temperature": number, "k": Value(INT64, (1,)),
        },
        {
            "fused": logits, "candidate_logits": candidates, "candidate_ids": Value(INT64, (None, None)), "log_normaliser": row,
            "sampling_normaliser": row, "unpenalised": candidates,
        },
    )  # fmt: skip
