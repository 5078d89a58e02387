"""Trace a Hugging Face causal LM into ONNX without its weights: parameters are fakes that have a shape and a name only."""

import copy
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.console.quiet import quiet
from fusionroute.fr_export.families import Family
from fusionroute.fr_export.graphs.dialects import Lowering, ort
from fusionroute.fr_export.graphs.dialects.layers import NORMS, cache_head_size
from fusionroute.fr_export.graphs.graph import Graph, Source
from fusionroute.runtime.errors import FusionError

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
    """A key that is equal for checkpoints which one trace can serve: the config without what does not shape the graph."""
    shaping = {key: value for key, value in config.to_dict().items() if key not in IDENTITY}
    return repr(sorted((shaping | {"vocab_size": vocab_size}).items(), key=lambda item: item[0]))


def trace(family: Family, config: Any, vocab_size: int, max_seq_len: int, lowering: Lowering = ort) -> Graph:
    """Trace one architecture in a dialect. Returns its graph with outputs logits, hidden, present; memory does not grow with the weights."""
    config = copy.deepcopy(config)
    config.vocab_size, config.pad_token_id, config.dtype = vocab_size, None, torch.float32
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    constants = computed_buffers(config, max_seq_len)
    input_names, output_names = lowering.names(config.num_hidden_layers)
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        arguments, dynamic = lowering.example(config, max_seq_len)
        with lowering.emitting(model):
            program = torch.onnx.export(
                lowering.Forward(model, max_seq_len).eval(), arguments, dynamo=True, dynamic_shapes=dynamic, input_names=input_names,
                output_names=output_names, opset_version=lowering.OPSET, optimize=False, verbose=False,
            )  # fmt: skip
    assert program is not None
    graph = Graph(program.model, {}, config.num_hidden_layers, (config.num_key_value_heads, cache_head_size(config.head_dim)))
    norms = {n.inputs[1].name for n in program.model.graph if n.op_type in NORMS}
    parameters = {name.removeprefix("model.") for name in program.model.graph.initializers}
    for name, value in list(program.model.graph.initializers.items()):
        traced, value.const_value = value.const_value, None  # the fake: real values are streamed in when a checkpoint is written
        short = name.removeprefix("model.")
        if not isinstance(traced.raw, FakeTensor):  # a number in the model's code, as transformers 4 has
            graph.sources[name] = Source(constant=traced.numpy())
            continue
        if short in constants:
            graph.sources[name] = Source(constant=constants[short])
            continue
        # torch names a tied pair by one of its two names, safetensors by the other
        stored = "model.embed_tokens.weight" if config.tie_word_embeddings and short == "lm_head.weight" else short
        cut = vocab_size if stored in ("model.embed_tokens.weight", "lm_head.weight") else None
        graph.sources[name] = Source((stored,), family.norm_offset if name in norms else 0.0, cut)
    if config.tie_word_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= parameters:
        raise FusionError("The trace separated the tied embedding from the head; this release of torch or transformers is not supported.")
    ClearMetadataAndDocStringPass()(graph.model)  # torch's notes: half of the file, with paths of this machine
    lowering.finish(graph, max_seq_len)
    return graph


def computed_buffers(config: Any, max_seq_len: int) -> dict[str, Any]:
    """Buffers that no checkpoint stores, from a real model of the same config with no layers and a tiny vocabulary.

    Float32: rotary tables `rotary_cos` and `rotary_sin` [max_seq_len, head_size / 2], and all non-persistent buffers by name.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 0, 8
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = []
    with torch.no_grad(), quiet():
        model: nn.Module = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(max_seq_len)[None])
        buffers = {name: buffer.float().numpy() for name, buffer in model.named_buffers()}
    half = cos.shape[-1] // 2
    return buffers | {
        "rotary_cos": cos[0, :, :half].contiguous().numpy(),
        "rotary_sin": sin[0, :, :half].contiguous().numpy(),
    }
