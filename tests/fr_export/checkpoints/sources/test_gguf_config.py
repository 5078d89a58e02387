"""What a GGUF says of its model beyond sizes: rotary scalings, softcaps, scales, ends."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fusionroute.fr_export.checkpoints.sources import gguf_file
from fusionroute.fr_export.checkpoints.sources.gguf_config import config_of, generation_of
from fusionroute.runtime.errors import InputError


def opened(folder: Path, architecture: str, *, tensors: dict[str, np.ndarray] | None = None, layers: int = 2, **keys: Any) -> Any:
    """A GGUF with keys of an architecture (dots written as double underscores) and a few tensors."""
    writer = gguf.GGUFWriter(folder / "model.gguf", architecture)
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(300)
    for key, value in keys.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    for kind, token in (("bos", 1), ("eos", 2), ("eot", 7), ("eom", 2)):
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    for name, values in {"blk.0.attn_norm.weight": np.ones(256, np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return gguf_file.read(folder / "model.gguf")


def frequencies(config: Any) -> torch.Tensor:
    """The rotary frequencies that transformers computes."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
    values: torch.Tensor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
    return values


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_told_from_its_divisors(factor: float, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 131072}
    rope = {
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = LlamaConfig(**sizes, rope_parameters=rope | {"rope_type": "llama3"})
    plain = LlamaConfig(**sizes, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    divisors = (frequencies(plain) / frequencies(original)).numpy()  # what the converter of llama.cpp writes
    file = opened(tmp_path, "llama", tensors={"rope_freqs.weight": divisors}, rope__dimension_count=64)
    config = AutoConfig.for_model(**config_of("It", file))
    assert torch.allclose(frequencies(config), frequencies(original))


def test_unknown_divisors_are_refused(tmp_path: Path) -> None:
    file = opened(tmp_path, "llama", tensors={"rope_freqs.weight": np.linspace(1, 8, 32, dtype=np.float32)}, rope__dimension_count=64)
    with pytest.raises(InputError, match=r"^It scales its rotary embedding in a way that a GGUF does not name: put the config.json"):
        config_of("It", file)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scalings_that_are_keys(kind: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rope__scaling__type": kind, "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32768}
    config = AutoConfig.for_model(**config_of("It", opened(tmp_path, "qwen2", **keys)))
    assert config.rope_parameters["rope_type"] == kind and config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 32768 and config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("architecture", "layers", "scale"), [("gemma2", 2, 32), ("gemma2", 46, 64), ("gemma3", 26, 32), ("gemma3", 62, 64)]
)
def test_gemma_has_softcaps_and_the_scale_of_its_size(architecture: str, layers: int, scale: int, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"attention__key_length": 32, "attention__sliding_window": 512}
    if architecture == "gemma2":
        keys |= {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
    config = config_of("It", opened(tmp_path, architecture, layers=layers, **keys))
    assert config["query_pre_attn_scalar"] == scale and config["head_dim"] == 32
    assert [config.get(f"{kind}_logit_softcapping") for kind in ("attn", "final")] == (
        [40, 20] if architecture == "gemma2" else [None, None]
    )


def test_phi_3_has_longrope(tmp_path: Path) -> None:
    factors = {f"rope_factors_{kind}.weight": np.linspace(1, top, 32, dtype=np.float32) for kind, top in (("short", 2), ("long", 8))}
    keys: dict[str, Any] = {"rope__dimension_count": 64, "rope__scaling__original_context_length": 4096}
    config = AutoConfig.for_model(**config_of("It", opened(tmp_path, "phi3", tensors=factors, **keys)))
    assert config.rope_parameters["rope_type"] == "longrope"
    for kind in ("short", "long"):
        assert np.allclose(config.rope_parameters[f"{kind}_factor"], factors[f"rope_factors_{kind}.weight"])


def test_architectures_that_transformers_does_not_describe_need_a_config(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot be described by transformers' GGUF reader \(.*bitnet.*\): put the config.json of the model"
    ):
        config_of("It", opened(tmp_path, "bitnet"))


def test_every_token_that_ends_a_text_or_a_turn_is_an_end(tmp_path: Path) -> None:
    assert generation_of(opened(tmp_path, "llama")) == {"eos_token_id": [2, 7]}
