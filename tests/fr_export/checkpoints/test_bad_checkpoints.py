"""Checkpoints that cannot be exported are refused before any work, in one sentence with the cause and the mend."""

import struct
from pathlib import Path

import pytest
import torch

from tests.support.damaged_checkpoints import (
    EMBEDDING,
    Damage,
    config,
    cut,
    edit,
    head,
    index,
    indexed,
    other_special,
    other_vocabulary,
    refusal,
    remove,
    retensor,
    sharded,
    smaller_embedding,
    tensor,
    then,
    without_tokenizers,
    write,
)
from tests.support.systems import write_tokenizer

DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # folders
    "missing folder": (remove("expert1"), ("expert1", "does not exist", "owner/name")),
    "file for a folder": (then(remove("expert1"), write("expert1", "")), ("expert1", "is a file")),
    "empty folder": (then(remove("expert1"), lambda r: (r / "expert1").mkdir()), ("Expert 'expert1'", "no config.json")),
    "no weights": (remove("expert1/model.safetensors"), ("expert1", "no model.safetensors", "again")),
    # config.json
    "config cut off": (cut("expert1/config.json"), ("Expert 'expert1'", "config.json", "JSON", "again")),
    "config not UTF-8": (write("expert1/config.json", b"\xff\xfe"), ("config.json", "JSON")),
    "config a list": (write("expert1/config.json", "[]"), ("config.json", "no JSON object")),
    "no model type": (config(model_type=None), ("model type None", "supported families", "llama3 ('llama')")),
    "other family": (config("router", model_type="gemma2"), ("'gemma2'", "expects 'llama'", "use --family gemma2")),
    "unknown family": (config(model_type="mamba"), ("'mamba'", "supported families", "llama3 ('llama')")),
    "quantised": (config(quantization_config={"quant_method": "aqlm"}), ("quantised by 'aqlm'", "fp32, fp16 or bf16")),
    "word for a size": (config(hidden_size="big"), ("invalid config.json", "hidden_size", "expected int")),
    "no heads": (config(num_attention_heads=0), ("invalid config.json",)),
    "heads that do not divide": (config(num_key_value_heads=3), ("invalid config.json", "multiple")),
    "no layers": (config(num_hidden_layers=0), ("invalid config.json", "at least one layer")),
    "negative size": (config(vocab_size=-1), ("invalid config.json",)),
    "unknown activation": (config(hidden_act="wave"), ("invalid config.json", "wave")),
    "unknown rotary": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ("spiral", "config.json")),
    "rotary by length": (config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), ("'dynamic'", "llama3")),
    # config and weights
    "other width": (config(hidden_size=64), ("expert1", "[300, 32]", "[300, 64]", "do not belong together")),
    "other vocabulary size": (config(vocab_size=299), ("expert1", "[300, 32]", "[299, 32]")),
    "other inner width": (config(intermediate_size=65), ("expert1", "mlp.", "[64, 32]", "[65, 32]")),
    "more layers": (config(num_hidden_layers=2), ("expert1", "lacks the tensor 'model.layers.1.", "incomplete")),
    "other key-value heads": (config(num_key_value_heads=2), ("self_attn.k_proj.weight", "[16, 32]", "[32, 32]")),
    "biases that are not there": (config(attention_bias=True), ("lacks the tensor", "q_proj.bias")),
    # safetensors
    "truncated": (cut("expert1/model.safetensors"), ("expert1/model.safetensors", "not a complete safetensors", "again")),
    "nearly whole": (cut("expert1/model.safetensors", 0.999), ("expert1/model.safetensors", "not a complete")),
    "empty": (write("expert1/model.safetensors", b""), ("expert1/model.safetensors", "not a complete")),
    "a pointer": (write("expert1/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), ("not a complete",)),
    "endless header": (write("expert1/model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), ("not a complete",)),
    "pickle": (
        then(remove("expert1/model.safetensors"), write("expert1/pytorch_model.bin", b"\x80\x04.")),
        ("pytorch_model.bin", "convert them to safetensors"),
    ),
    "other pickle": (
        then(remove("expert1/model.safetensors"), write("expert1/consolidated.00.pth", b"\x80\x04.")),
        ("consolidated.00.pth", "safetensors"),
    ),
    "int8 tensor": (tensor("model.layers.0.mlp.up_proj.weight", lambda t: t.to(torch.int8)), ("I8", "up_proj", "fp32, fp16 or bf16")),
    "fp64 tensor": (tensor("model.norm.weight", lambda t: t.double()), ("F64", "model.norm.weight")),
    "missing tensor": (
        lambda r: retensor(r / "expert1/model.safetensors", lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
        ("expert1", "lacks the tensor 'model.layers.0.mlp.up_proj.weight'", "incomplete"),
    ),
    # shards
    "missing shard": (
        then(sharded, remove("expert1/model-00002-of-00002.safetensors")),
        ("lacks the shard model-00002-of-00002.safetensors", "again"),
    ),
    "cut shard": (
        then(sharded, cut("expert1/model-00002-of-00002.safetensors")),
        ("model-00002-of-00002.safetensors", "not a complete safetensors"),
    ),
    "shard above": (indexed({EMBEDDING: "../router/model.safetensors"}), ("outside its folder", "beside the index")),
    "shard elsewhere": (lambda r: index(r / "expert1", {EMBEDDING: str(r / "router/model.safetensors")}), ("outside its folder",)),
    "shard in a folder": (indexed({EMBEDDING: "part/model.safetensors"}), ("outside its folder",)),
    "index of numbers": (indexed({EMBEDDING: 5}), ("not a valid shard index", "again")),
    "index a list": (indexed([1]), ("not a valid shard index",)),
    "empty index": (indexed({}), ("expert1", "lacks the tensor")),
    "index cut off": (
        then(sharded, cut("expert1/model.safetensors.index.json")),
        ("model.safetensors.index.json", "not a valid shard index"),
    ),
    # tokenizers
    "tokenizer cut off": (cut("expert1/tokenizer.json"), ("Expert 'expert1'", "tokenizer.json", "again")),
    "tokenizer without model": (write("router/tokenizer.json", '{"added_tokens": []}'), ("The router", "broken tokenizer", "again")),
    "tokenizer a list": (write("router/tokenizer.json", "[]"), ("The router", "broken tokenizer")),
    "tokenizer without vocabulary": (write("router/tokenizer.json", '{"model": {"type": "BPE"}}'), ("The router", "broken tokenizer")),
    "tokenizer of no tokens": (
        write("router/tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ("The router", "holds no tokens"),
    ),
    "expert without tokenizer": (remove("expert1/tokenizer.json"), ("Expert 'expert1'", "no tokenizer.json", "copy")),
    "router without tokenizer": (remove("router/tokenizer.json"), ("The router", "no tokenizer.json", "copy")),
    "other vocabulary": (other_vocabulary, ("Expert 'expert1'", "2 entries differ", "equal vocabularies")),
    "larger vocabulary": (lambda r: write_tokenizer(r / "expert1", 301), ("Expert 'expert1'", "301 and 300 tokens")),
    "other special tokens": (other_special, ("Expert 'expert1'", "special tokens <eos>", "equal")),
    "other first token": (config(bos_token_id=2), ("Expert 'expert1'", "bos_token_id")),
    "tokens that nothing embeds": (smaller_embedding, ("Expert 'expert1'", "embeds 290 tokens", "300")),
    "sizes without a tokenizer": (lambda r: without_tokenizers(r, 290), ("[290, 300]", "equal")),
    # texts of the router
    "tokenizer config cut off": (
        then(remove("router/chat_template.jinja"), cut("router/tokenizer_config.json")),
        ("The router", "tokenizer_config.json", "JSON"),
    ),
    "template that is none": (
        then(remove("router/chat_template.jinja"), lambda r: edit(r / "router/tokenizer_config.json", chat_template=5)),
        ("The router", "chat_template", "no text"),
    ),
    "template not UTF-8": (write("router/chat_template.jinja", b"\xff"), ("The router", "chat_template.jinja", "UTF-8")),
    "generation config cut off": (cut("router/generation_config.json"), ("The router", "generation_config.json")),
    "end that is no id": (
        lambda r: edit(r / "router/generation_config.json", eos_token_id=["</s>"]),
        ("The router", "'</s>'", "generation_config.json", "whole numbers"),
    ),
    # the routing head
    "no head": (
        remove("router/routing_head.safetensors"),
        ("The router", "'routing_head.weight'", "routing_head.safetensors", "--routing-head-key"),
    ),
    "head of three": (head(lambda t: torch.zeros(3, 32)), ("shape [3, 32]", "2 expert(s) (expert0, expert1)", "[2, 32]")),
    "head of another width": (head(lambda t: t[:, :31]), ("shape [2, 31]", "[2, 32]")),
    "head of no shape": (head(lambda t: torch.tensor(1.0)), ("shape []", "[2, 32]")),
    "head of integers": (head(lambda t: t.to(torch.int32)), ("I32", "routing_head.weight")),
    "head in double precision": (
        head(lambda t: t.to(torch.float64)),
        ("is F64; expected fp32, fp16 or bf16: save the checkpoint in fp32.", "routing_head.weight"),
    ),
    "head of nothing": (head(lambda t: t * float("nan")), ("routing_head", "not finite")),
    "bias of three": (head(lambda t: torch.zeros(3), "routing_head.bias"), ("bias of shape [3]", "[2]")),
    "head cut off": (cut("router/routing_head.safetensors"), ("routing_head.safetensors", "not a complete")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(root: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(root)
    sentence = refusal(root)
    for word in words:
        assert word in sentence, sentence
