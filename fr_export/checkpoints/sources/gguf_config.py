"""config.json and generation_config.json from what a GGUF file says of its model.

transformers' reader gives the sizes; it leaves out what follows here: rotary scalings, softcaps and attention scales.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile
from fusionroute.fr_export.checkpoints.sources.gguf_tensors import GgufTensor
from fusionroute.fr_export.console.quiet import quiet
from fusionroute.runtime.errors import InputError, one_line

MEND = "put the config.json of the model it was made from beside it"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of all Llama 3.1 to 3.3
GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of the models that scale queries by hidden size / heads


def config_of(where: str, gguf_file: GgufFile) -> dict[str, Any]:
    """config.json as a dict. Raises InputError for a model that cannot be described from what the file says."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        with quiet():
            config: dict[str, Any] = dict(load_gguf_checkpoint(str(gguf_file.files[0]))["config"])
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{where} cannot be described by transformers' GGUF reader ({one_line(error)}): {MEND}.") from error
    for key in ("_model_name_or_path", "unk_token_id"):
        config.pop(key, None)
    config = {key: shortest(value) if isinstance(value, float) else value for key, value in config.items()}
    prefix = gguf_file.architecture
    if (width := gguf_file.get(f"{prefix}.attention.key_length")) is not None:
        config["head_dim"] = width
    if "blk.0.attn_q.bias" in gguf_file.parts and prefix == "llama":
        config["attention_bias"] = True
    # the first part of a split file lacks other parts' tensors
    config["tie_word_embeddings"] = "output.weight" not in gguf_file.parts
    config |= scaled_rotary(where, gguf_file, config)
    if prefix in AMENDMENTS:
        config |= AMENDMENTS[prefix](gguf_file, config)
    return config


def shortest(value: float) -> float:
    """The number that was stored in single precision, such as 1e-05: equal models then have equal configs."""
    return float(str(np.float32(value)))


def generation_of(gguf_file: GgufFile) -> dict[str, Any]:
    """generation_config.json: all tokens that end a text or a turn."""
    ends = [gguf_file.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def scaled_rotary(where: str, gguf_file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary scaling: as keys for linear and yarn, as a tensor of divisors for Llama 3."""
    scaling = f"{gguf_file.architecture}.rope.scaling"
    kind, factor = gguf_file.get(f"{scaling}.type"), gguf_file.get(f"{scaling}.factor")
    if kind in ("linear", "yarn") and factor:
        rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if (original := gguf_file.get(f"{scaling}.original_context_length")) is not None:
            rope["original_max_position_embeddings"] = original
        return {"rope_scaling": rope}
    if "rope_freqs.weight" in gguf_file.parts:
        return {"rope_scaling": llama3_rotary(where, vector(gguf_file, "rope_freqs.weight"), config)}
    return {}


def llama3_rotary(where: str, divisors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The scaling "llama3" that gives `divisors` float32 [head_size / 2] of the rotary frequencies."""
    rope = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    expected = np.empty(head // 2)
    for pair in range(head // 2):
        turns = LLAMA3["original_max_position_embeddings"] * config["rope_theta"] ** (-2 * pair / head) / (2 * math.pi)
        smooth = (turns - LLAMA3["low_freq_factor"]) / (LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        expected[pair] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise InputError(f"{where} scales its rotary embedding in a way that a GGUF does not name: {MEND}.")
    return rope


def vector(gguf_file: GgufFile, name: str) -> np.ndarray:
    """A small tensor float32, flat."""
    stored = GgufTensor(gguf_file.parts[name])
    with stored.open() as read:
        values: np.ndarray = read(0, stored.shape[0]).numpy()
    return values.reshape(-1)


def gemma(gguf_file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Softcaps, and the scale of queries, which llama.cpp tells by the number of layers."""
    arch, heads = gguf_file.architecture, config["num_attention_heads"]
    large = config["num_hidden_layers"] == GEMMA_27B[arch]
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    caps = {key: gguf_file.get(f"{arch}.{key}") for key in keys if f"{arch}.{key}" in gguf_file}
    return caps | {"query_pre_attn_scalar": config["hidden_size"] // heads if large else config["head_dim"]}


def phi3(gguf_file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The share of a head that is rotated, and the factors of longrope, which are tensors."""
    changes: dict[str, Any] = {}
    if (rotated := gguf_file.get("phi3.rope.dimension_count")) is not None:
        changes["partial_rotary_factor"] = rotated * config["num_attention_heads"] / config["hidden_size"]
    if "rope_factors_long.weight" in gguf_file.parts:
        factors = {f"{kind}_factor": vector(gguf_file, f"rope_factors_{kind}.weight").tolist() for kind in ("short", "long")}
        changes["rope_scaling"] = {"type": "longrope", **factors}
        changes["original_max_position_embeddings"] = gguf_file.get("phi3.rope.scaling.original_context_length")
    return changes


AMENDMENTS: dict[str, Callable[[GgufFile, dict[str, Any]], dict[str, Any]]] = {"gemma2": gemma, "gemma3": gemma, "phi3": phi3}
