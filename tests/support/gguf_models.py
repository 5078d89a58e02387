"""GGUF files of small models, written as llama.cpp's converter writes them, with gguf's own writer and quantisers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

SCALES = {Type.Q4_K: (0, 2), Type.Q6_K: (208,)}  # bytes of a block at which fp16 scales stand


def random_blocks(kind: Type, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows uint8 [rows, bytes] of a type that gguf cannot quantise to: random blocks with small scales."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, width // values, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = generator.uniform(0.5e-4, 2e-4, (rows, width // values, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scales.view(np.uint8)
    flat: np.ndarray = blocks.reshape(rows, -1)
    return flat


def quantise(array: np.ndarray, kind: Type) -> np.ndarray:
    """As llama-quantize stores an array."""
    stored: np.ndarray = random_blocks(kind, *array.shape) if kind in SCALES else gguf.quantize(array, kind)
    return stored


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as `LlamaModel.permute` of llama.cpp's converter orders them."""
    rows: np.ndarray = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return rows


def write_gguf(
    file: Path,
    model: Any,
    architecture: str,
    kind: Type | Mapping[str, Type] = Type.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    split: int = 0,
) -> dict[str, torch.Tensor]:
    """Write a Hugging Face model. Returns what the file holds, dequantised, under the model's names.

    `kind`: the type of matrices, all or by GGUF name. `more` adds keys. `split`: tensors of each part of a split file.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    more(writer)
    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        target = f"{names.get_name(stem)}.{suffix}"
        array = tensor.float().numpy()
        if architecture == "gemma2" and name.endswith("norm.weight"):
            array = array + 1
        of_heads = heads.get(target.split(".")[-2], 0) if architecture == "llama" else 0
        if of_heads:
            array = permuted(array, of_heads)
        this = Type.F32 if array.ndim == 1 else kind if isinstance(kind, Type) else kind.get(target, Type.F32)
        data = quantise(array, this)
        writer.add_tensor(target, data, raw_dtype=this)
        values = np.asarray(gguf.dequantize(data.view(np.uint8), this), np.float32).reshape(array.shape)
        if of_heads:  # LlamaTensorProcessor._reverse_permute_weights of transformers
            values = values.reshape(of_heads, -1, 2, *values.shape[1:]).swapaxes(2, 1).reshape(values.shape)
        stored[name] = torch.from_numpy(values - 1 if architecture == "gemma2" and name.endswith("norm.weight") else values)
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def rope_theta(config: Any) -> float:
    """Where transformers 4 and 5 keep it."""
    return float((getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta)


def with_byte_vocabulary(writer: gguf.GGUFWriter, vocab: int, pre: str = "gpt-2") -> None:
    """A byte-level vocabulary: three special tokens, 256 bytes, made-up words up to `vocab`."""
    from tokenizers import pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"unused{number}" for number in range(vocab - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words[:vocab])
    writer.add_token_types([3] * 3 + [1] * (vocab - 3))
    writer.add_token_merges([])
    writer.add_add_bos_token(True)
