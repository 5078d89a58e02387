"""Small inputs that each parser takes, to begin with, and words that their mutations may be made of."""

import io
import json
import tarfile
from collections.abc import Mapping

SHA = "0" * 64


def manifest_text() -> bytes:
    """A small manifest."""
    model = {"layers": 1, "kv_heads": 1, "head_size": 16, "parameters": 9}
    graphs = {"router": "graphs/r.onnx", "a": "graphs/a.onnx"}
    variant = {"target": "ort:cpu", "precision": "fp32", "graphs": graphs, "fusion_graph": "graphs/f.onnx", "bits_per_weight": 32.0}
    files: dict[str, dict[str, object]] = {
        name: {"sha256": SHA, "bytes": 1} for name in ("graphs/r.onnx", "graphs/a.onnx", "graphs/f.onnx")
    }
    files["graphs/w.bin"] = {"sha256": SHA, "bytes": 64, "tensors": [{"sha256": SHA, "offset": 0, "bytes": 64}]}
    content = {
        "format": 2, "family": "llama3", "models": [{"name": "router", **model}, {"name": "a", **model}], "fusion": "weighted", "lam": 0.5,
        "vocab_size": 300, "max_seq_len": 64, "bos_token": None, "eos_token": "<e>", "eos_token_ids": [2], "variants": [variant], "files": files,
    }  # fmt: skip
    return json.dumps(content).encode()


def message(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def graph_bytes() -> bytes:
    """Graphs with a node, a constant, and an initialiser in a file: one part each, so that lengths stay below 128."""
    external = message(13, message(1, b"location") + message(2, b"w/r.bin")) + message(13, message(1, b"offset") + message(2, b"64"))
    tensor = bytes([1 << 3, 4, 2 << 3, 1]) + message(8, b"w") + external
    table = bytes([1 << 3, 8, 1 << 3, 2, 2 << 3, 1]) + message(8, b"cos") + message(9, bytes(16))
    node = message(1, b"x") + message(1, b"ids") + message(1, b"cos") + message(4, b"RotaryEmbedding") + message(5, message(5, table))
    return bytes([1 << 3, 9]) + b"".join(message(7, part) for part in (message(1, node), message(5, tensor), message(5, table)))


def safetensors(header: Mapping[str, object], size: int) -> bytes:
    """A safetensors file with so many bytes of zeros."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def tar(*members: tuple[str, bytes]) -> bytes:
    """An archive."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


TENSORS = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}}
PLAN = {"plan": '{"groups": [], "vectors": []}', "scales": '{"a": [1.0]}', "types": '{"a": "F16"}'}
FACTORS = {"a:0.a": TENSORS["a"], "a:0.b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [16, 24]}, "__metadata__": PLAN}
TOKENIZER = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "_"}, {"type": "NFKC"}]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "_"}, "post_processor": None, "decoder": {"type": "Sequence", "decoders": []},
    "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip
LORA = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    "rank_pattern": {"q": 2}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none", "use_rslora": False,
}  # fmt: skip

SEEDS: dict[str, list[bytes]] = {
    "strict_json": [b'{"a": [1, -2.5e3, true, null, "\\u00e9"]}', b"[[[[]]]]", manifest_text()],
    "manifest": [manifest_text()],
    "graph": [graph_bytes()],
    "tensor_file": [safetensors(TENSORS, 24), safetensors({"__metadata__": {"x": "y"}}, 0)],
    "factors": [safetensors(FACTORS, 24), safetensors(TENSORS | {"__metadata__": PLAN}, 24)],
    "tokenizer": [json.dumps(TOKENIZER).encode()],
    "archive": [tar(("manifest.json", manifest_text()), ("manifest.json.sig", bytes(64)), ("graphs/r.onnx", b"x"))],
    "lora_config": [json.dumps(LORA).encode()],
}
