"""GGUF files as sources, against gguf's own dequantisation and transformers' own reader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint, empty_model
from fusionroute.fr_export.checkpoints.sources import gguf_file
from fusionroute.fr_export.checkpoints.sources.gguf_config import config_of
from fusionroute.fr_export.checkpoints.sources.gguf_tensors import GgufTensor, tensors
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.runtime.errors import InputError, UnavailableError
from tests.support.gguf_models import quantise, with_byte_vocabulary, write_gguf

IDS = torch.arange(3, 40)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
# transformers' reader leaves out the last two of Gemma's keys, so its defaults are taken here
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, head_dim=32),
    "gemma2": lambda: Gemma2Config(**SIZES, **GEMMA),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
}
KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q6_K]


def model_of(architecture: str, **changes: Any) -> Any:
    """A model with seeded random weights, norms and biases too."""
    config = MODELS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def keys_of(architecture: str, more: Callable[[Any], None] = lambda _: None) -> Callable[[Any], None]:
    def write(writer: Any) -> None:
        with_byte_vocabulary(writer, 300)
        if architecture == "gemma2":
            writer.add_attn_logit_softcapping(50.0)
            writer.add_final_logit_softcapping(30.0)
            writer.add_sliding_window(16)
        else:
            writer.add_rope_dimension_count(32)
        more(writer)

    return write


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_any_rows_are_those_of_the_whole_tensor(kind: Type, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    heads, half, blocks = data.draw(st.sampled_from([0, 1, 3])), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    rows, width = max(heads, 1) * 2 * half, blocks * 256
    stored = quantise(np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32), kind)
    file = tmp_path_factory.mktemp("gguf") / "one.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("pad", np.zeros(3, np.float32))  # so that the tensor begins somewhere
    writer.add_tensor("one", stored, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expected = torch.from_numpy(np.array(gguf.dequantize(stored.view(np.uint8), kind), np.float32))
    if heads:
        expected = expected.reshape(heads, half, 2, width).transpose(1, 2).reshape(rows, width)
    tensor = GgufTensor(gguf_file.read(file).parts["one"], heads)
    assert tensor.shape == (rows, width) and tensor.files == (file,)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    with tensor.open() as read:
        assert torch.equal(read(start, stop), expected[start:stop])
    assert (tensor.layout is None) == (kind not in (Type.Q4_0, Type.Q8_0))
    if tensor.layout is not None:
        with tensor.open_blocks() as read_blocks:
            codes, scales, _ = read_blocks(start, stop)
        values = (codes.astype(np.float32) - (1 << (tensor.layout.bits - 1))) * scales.astype(np.float32)[..., None]
        assert np.array_equal(values.reshape(stop - start, width), expected[start:stop])


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_computes_what_it_computes_in_transformers(architecture: str, kind: Type, tmp_path: Path) -> None:
    model = model_of(architecture)
    stored = write_gguf(tmp_path / "model.gguf", model, architecture, kind, keys_of(architecture))
    opened = gguf_file.read(tmp_path / "model.gguf")
    config = AutoConfig.for_model(**config_of("It", opened))
    ours = empty_model(config).to_empty(device="cpu")
    entries = tensors(
        "It", opened, [name for name in ours.state_dict() if name != "lm_head.weight" or not config.tie_word_embeddings], config
    )
    assert set(entries) == set(stored)
    with torch.no_grad():
        state = {}
        for name, entry in entries.items():
            with entry.open() as read:
                state[name] = read(0, entry.shape[0])
            assert torch.allclose(state[name], stored[name], atol=1e-6), name
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", attn_implementation="eager", dtype=torch.float32
        ).eval()
        ours = type(theirs).from_pretrained(None, config=config, state_dict=state, attn_implementation="eager", dtype=torch.float32).eval()
        model.load_state_dict(stored, strict=False)
        logits = ours(IDS).logits
        assert torch.allclose(logits, theirs(IDS).logits, atol=1e-4)
        assert torch.allclose(logits, model(IDS).logits, atol=1e-4) and logits.std() > 0.1


def test_a_checkpoint_of_a_gguf_is_whole(tmp_path: Path) -> None:
    model = model_of("llama")
    file = tmp_path / "model-Q8_0.gguf"
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

    def more(writer: Any) -> None:
        writer.add_chat_template(template)
        writer.add_eot_token_id(7)

    stored = write_gguf(file, model, "llama", Type.Q8_0, keys_of("llama", more))
    checkpoint = Checkpoint.open("router", str(file))
    assert Checkpoint.open("router", str(tmp_path)).weights.files == {file}, "the only model of a folder"
    assert checkpoint.end_tokens == [2, 7] and checkpoint.chat_template == template
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.encode("ab").tokens == ["<bos>", "a", "b"]
    assert (checkpoint.source.kind, checkpoint.source.bytes, checkpoint.source.dtypes) == ("gguf", file.stat().st_size, ("F32", "Q8_0"))
    assert "quantised already (16 Q8_0 tensors)" in checkpoint.source.notes[0] and "tokenizer.json" in checkpoint.source.notes[1]
    model.load_state_dict(stored, strict=False)
    with torch.no_grad():
        assert torch.allclose(torch_model(checkpoint)(IDS).logits, model(IDS).logits, atol=1e-5)


def test_texts_beside_a_gguf_take_precedence(tmp_path: Path) -> None:
    model = model_of("llama")
    write_gguf(tmp_path / "model.gguf", model, "llama", more=keys_of("llama"))
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model.config.save_pretrained(tmp_path)
    save_file({"routing_head.weight": torch.ones(1, 256)}, tmp_path / "routing_head.safetensors")
    checkpoint = Checkpoint.open("router", str(tmp_path), head_key="routing_head")
    assert checkpoint.weights.shape("routing_head.weight") == (1, 256)
    assert checkpoint.source.bytes == sum((tmp_path / name).stat().st_size for name in ("model.gguf", "routing_head.safetensors"))
    assert checkpoint.config.rope_parameters["factor"] == 4.0
    assert checkpoint.source.notes == ("generation_config.json, tokenizer.json, tokenizer_config.json converted from its keys",)


def test_split_files_are_one_model_and_missing_parts_are_named(tmp_path: Path) -> None:
    model = model_of("llama")
    stored = write_gguf(tmp_path / "model.gguf", model, "llama", more=keys_of("llama"), split=8)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) == 3 and not (tmp_path / "model.gguf").exists()
    for source in (tmp_path, parts[0], parts[2]):
        checkpoint = Checkpoint.open("math", str(source))
        assert checkpoint.weights.files == set(parts)
        assert all(torch.equal(torch.from_numpy(checkpoint.weights.read(name)), values) for name, values in stored.items())
    parts[1].unlink()
    with pytest.raises(InputError, match=r"one of 3 parts, and model-00002-of-00003.gguf is not beside it: download all parts"):
        Checkpoint.open("math", str(parts[0]))


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("b-Q8_0", "a-Q4_K_M", "mmproj-a"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(InputError, match=r"holds 2 GGUF models \(a-Q4_K_M.gguf, b-Q8_0.gguf\): name one of them, such as .*a-Q4_K_M"):
        Checkpoint.open("math", str(tmp_path))


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_half_a_file_is_refused(keep: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", more=keys_of("llama"))
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"model.gguf is not a complete GGUF file \(.*\): download it again"):
        Checkpoint.open("math", str(tmp_path / "model.gguf"))


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", more=keys_of("llama"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UnavailableError, match=r"needs the package gguf, which the extra .gguf. brings: pip install gguf"):
        Checkpoint.open("math", str(tmp_path / "model.gguf"))


def test_types_and_architectures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", model_of("llama"), "llama", more=keys_of("llama"))
    opened = gguf_file.read(tmp_path / "model.gguf")
    odd = opened.parts["blk.0.attn_v.weight"]
    changed = gguf_file.GgufFile(
        opened.files, opened.fields, opened.parts | {"blk.0.attn_v.weight": gguf_file.GgufPart(odd.file, odd.start, 9, "Q8_1", odd.shape)}
    )
    with pytest.raises(InputError, match=r"holds tensors of the type Q8_1, which the package gguf cannot dequantise"):
        tensors("It", changed, ["model.layers.0.self_attn.v_proj.weight"], LlamaConfig(**SIZES))
    monkey = gguf_file.GgufFile(opened.files, {}, opened.parts)
    with pytest.raises(InputError, match="architecture 'None', which this release"):
        tensors("It", monkey, [], LlamaConfig(**SIZES))
