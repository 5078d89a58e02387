"""Trace a Hugging Face causal LM into ONNX without its weights: parameters are fakes with a shape and a name."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.console.quiet import quiet
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.graphs.dialects import Dialect, ort, rotary
from fusionroute.fr_export.graphs.dialects.layers import NORMS, cache_head_size
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.fr_export.graphs.layer_kinds import Alike, alike, leave_out
from fusionroute.fr_export.graphs.repeat_layers import repeat_layers
from fusionroute.runtime.errors import FusionError, one_line

IDENTITY = {
    "_name_or_path",
    "architectures",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
}


def architecture(config: Any, vocab_size: int) -> str:
    """A key that is equal for checkpoints which one trace can serve: what of the config shapes the graph."""
    shaping = {key: value for key, value in config.to_dict().items() if key not in IDENTITY}
    return repr(sorted((shaping | {"vocab_size": vocab_size}).items(), key=lambda item: item[0]))


def trace(family: Family, config: Any, vocab_size: int, max_seq_len: int, dialect: Dialect = ort) -> Graph:
    """Trace one architecture in a dialect. Returns its graph with outputs logits, hidden, present; memory does not grow
    with the weights.

    Raises FusionError for a family that the tracer cannot serve.
    """
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, key, None) is None:
            raise unserved(family, f"'{key}' in its config")
    config = copy.deepcopy(config)
    config.vocab_size, config.pad_token_id, config.dtype = vocab_size, None, torch.float32
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    with refusing(family):
        constants = computed_buffers(family, config, max_seq_len)
        with torch.device("meta"):  # the other dialects' traces do not list the layers one after the other
            kinds = alike(AutoModelForCausalLM.from_config(config, dtype=torch.float32)) if dialect is ort else []
    if kinds:
        with suppress(FusionError):  # where that does not do, a trace of all layers does, or tells why not
            graph = traced(family, config, max_seq_len, dialect, constants, kinds)
            repeat_layers(graph, kinds, dialect.names(graph.layers)[1])
            return graph
    return traced(family, config, max_seq_len, dialect, constants, [])


def traced(
    family: Family, config: Any, max_seq_len: int, dialect: Dialect, constants: Mapping[str, np.ndarray], kinds: Sequence[Alike]
) -> Graph:
    """The graph of a config without the layers that `kinds` leave out. `constants` are the values of its buffers."""
    input_names, output_names = dialect.names(config.num_hidden_layers)
    with refusing(family), quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        leave_out(model, [number for each in kinds for number in each.left_out])
        arguments, dynamic = dialect.example(config, max_seq_len)
        with dialect.emitting(model):
            program = torch.onnx.export(
                dialect.Forward(model, max_seq_len).eval(), arguments, dynamo=True, dynamic_shapes=dynamic, input_names=input_names,
                output_names=output_names, opset_version=dialect.OPSET, optimize=False, verbose=False,
            )  # fmt: skip
    assert program is not None
    for value, name in zip(program.model.graph.inputs, input_names, strict=True):
        value.name = name  # a cache that no traced layer writes is an output too, and took that one's name
    graph = Graph(program.model, {}, config.num_hidden_layers, (config.num_key_value_heads, cache_head_size(config.head_dim)))
    norms = {n.inputs[1].name for n in program.model.graph if n.op_type in NORMS}
    parameters = {name.removeprefix("model.") for name in program.model.graph.initializers}
    for name, value in list(program.model.graph.initializers.items()):
        # the fake: real values are streamed in when a checkpoint is written
        traced, value.const_value = value.const_value, None
        short = name.removeprefix("model.")
        if not isinstance(traced.raw, FakeTensor):  # a number in the model's code, as transformers 4 has
            graph.sources[name] = Source(constant=traced.numpy())
            continue
        if short in constants:
            graph.sources[name] = Source(constant=constants[short])
            continue
        # torch names a tied pair by one of its two names, safetensors by the other
        stored = "model.embed_tokens.weight" if config.tie_word_embeddings and short == "lm_head.weight" else short
        cut = config.vocab_size if stored in ("model.embed_tokens.weight", "lm_head.weight") else None
        graph.sources[name] = Source((stored,), family.norm_offset if name in norms else 0.0, cut)
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= parameters:
        raise FusionError("The trace separated the tied embedding from the head; this release of torch or transformers is not supported.")
    ClearMetadataAndDocStringPass()(graph.model)  # torch's notes: half of the file, with paths of this machine
    dialect.finish(graph, max_seq_len)
    return graph


def computed_buffers(family: Family, config: Any, max_seq_len: int) -> dict[str, Any]:
    """Buffers that no checkpoint stores, from a real model of the same config with no layers and a tiny vocabulary.

    Float32 by name, as the dialects' models have them: with rotary tables of `max_seq_len` positions, or with what the
    model computes its own from. Raises FusionError for a family that lacks what the dialects rely on.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 0, 8
    with torch.no_grad(), quiet():
        buffers: dict[str, Any] = {}
        for stand_in in (rotary.defer, partial(rotary.tabulate, positions=max_seq_len)):
            model: nn.Module = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
            check_served(family, model)
            stand_in(model)
            buffers |= {name: buffer.float().numpy() for name, buffer in model.named_buffers()}
    return buffers


def check_served(family: Family, model: nn.Module) -> None:
    """Refuse a model that lacks what the dialects replace or read. Raises FusionError naming it."""
    if not hasattr(getattr(model, "model", None), "rotary_emb"):
        raise unserved(family, "rotary embeddings at 'model.rotary_emb'")
    for module in rotary.embeddings(model).values():
        if more := set(rotary.required(module)) - {"layer_type"}:
            raise unserved(family, f"rotary tables by position and kind of layer (its own also depend on {' and '.join(sorted(more))})")
    if not hasattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb"):
        raise unserved(family, "a function 'apply_rotary_pos_emb' beside its model")
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise unserved(family, "a linear head at 'lm_head'")


@contextmanager
def refusing(family: Family) -> Iterator[None]:
    """End what a model cannot do as a FusionError that names its family.

    Faults of the machine pass as they are: a full disk or memory, a missing package.
    """
    try:
        yield
    except FusionError:
        raise
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, torch.onnx.OnnxExporterError) and cause.__cause__ is not None:  # torch wraps what stopped it
            cause = cause.__cause__
        if isinstance(cause, (ImportError, OSError, MemoryError)):
            raise cause from None
        # from the first ANSI code on, which `one_line` has spelled out, torch's text is advice to developers
        reason = one_line(cause).partition("\\x1b")[0].rstrip(" .:") or type(cause).__name__
        raise FusionError(f"The family {family.name} cannot be traced: {reason}") from error


def unserved(family: Family, lack: str) -> FusionError:
    """The error for a family that lacks something."""
    return FusionError(f"The family {family.name} cannot be traced, since it lacks {lack}: only decoders built like Llama and Gemma 2 can.")
