"""Checkpoints that cannot be exported are refused before any work, in one sentence with the cause and the mend."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints import hub
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import DEFAULT_CONTEXT, System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.errors import FusionError, InputError, UnavailableError
from tests.support.systems import Shape, make_model, make_system, write_tokenizer

SHAPE = Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, experts=2, tokenizer=True)
EMBEDDING = "model.embed_tokens.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_system(folder, SHAPE)
    return folder


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """Folders router, expert0 and expert1, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "system"))


def open_system(root: Path, family: str = "llama3", **options: Any) -> System:
    return System.open(FAMILIES[family], str(root / "router"), {name: str(root / name) for name in ("expert0", "expert1")}, **options)


def refusal(root: Path, kind: type[FusionError] = InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        open_system(root, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder: Path) -> None:
    """Split model.safetensors into two shards with an index."""
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    files = {f"model-0000{n}-of-00002.safetensors": dict(part) for n, part in ((1, tensors[:3]), (2, tensors[3:]))}
    for file, part in files.items():
        save_file(part, folder / file)
    index(folder, {name: file for file, part in files.items() for name in part})


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def then(*damages: Damage) -> Damage:
    """One damage after the other."""

    def all_of_them(root: Path) -> None:
        for damage in damages:
            damage(root)

    return all_of_them


def remove(name: str) -> Damage:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def cut(name: str, keep: float = 0.5) -> Damage:
    def damage(root: Path) -> None:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def indexed(weight_map: object) -> Damage:
    return lambda root: index(root / "expert1", weight_map)


def sharded(root: Path) -> None:
    shard(root / "expert1")


def config(**fields: Any) -> Damage:
    return lambda root: edit(root / "expert1" / "config.json", **fields)


def write(name: str, content: bytes | str) -> Damage:
    def damage(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = "expert1/model.safetensors") -> Damage:
    return lambda root: retensor(root / file, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def head(change: Callable[[torch.Tensor], torch.Tensor], name: str = "routing_head.weight") -> Damage:
    return tensor(name, change, "router/routing_head.safetensors")


def other_vocabulary(root: Path) -> None:
    file = root / "expert1" / "tokenizer.json"
    file.write_text(file.read_text().replace("<unused7>", "<used7>"))


def other_special(root: Path) -> None:
    file = root / "expert1" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<eos>"]
    file.write_text(json.dumps(content))


def without_tokenizers(root: Path, vocab: int) -> None:
    """A system without tokenizers, one model of which has another vocabulary."""
    for folder in root.iterdir():
        (folder / "tokenizer.json").unlink()
    shutil.rmtree(root / "expert1")
    make_model(root / "expert1", Shape(heads=2, kv_heads=1, head_dim=16, hidden=32, layers=1, vocab=vocab), 0, expert=True)


def smaller_embedding(root: Path) -> None:
    retensor(root / "expert1/model.safetensors", lambda t: t.update({n: t[n][:290].clone() for n in (EMBEDDING, "lm_head.weight")}))
    edit(root / "expert1/config.json", vocab_size=290)


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
    "no model type": (config(model_type=None), ("model type None", "'llama'", "gemma2, llama3")),
    "other family": (config(model_type="gemma2"), ("'gemma2'", "expects 'llama'", "use --family gemma2")),
    "unknown family": (config(model_type="mamba"), ("'mamba'", "expects 'llama'", "gemma2, llama3")),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), ("already quantised", "fp32, fp16 or bf16")),
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


def test_whole_checkpoints_are_taken(root: Path) -> None:
    """Also in shards, behind links, with a head of another name and of half precision."""
    assert open_system(root).vocab_size == 300
    shard(root / "expert0")
    (root / "store").mkdir()
    for file in list((root / "expert1").iterdir()):
        file.rename(root / "store" / file.name)
        file.symlink_to(root / "store" / file.name)
    head = load_file(root / "router/routing_head.safetensors")
    save_file({"gate.weight": head["routing_head.weight"].bfloat16()}, root / "router/routing_head.safetensors")
    system = open_system(root, head_key="gate")
    assert system.head.weight.shape == (2, 32) and not system.head.bias.any()
    assert system.max_seq_len == min(1024, DEFAULT_CONTEXT)


def test_no_tokenizer_at_all_is_no_error(root: Path) -> None:
    without_tokenizers(root, 300)
    system = open_system(root)
    assert system.router.tokenizer is None and system.vocab_size == 300


@pytest.mark.parametrize("length", [1025, 1, 0])
def test_contexts_that_do_not_fit(root: Path, length: int) -> None:
    edit(root / "expert0/config.json", max_position_embeddings=2048)
    sentence = refusal(root, max_seq_len=length)
    assert f"--max-seq-len {length} does not fit" in sentence and "2 to 1024" in sentence


def test_the_wrong_family_for_all(root: Path) -> None:
    sentence = refusal(root, family="gemma2")
    assert "The router" in sentence and "use --family llama3" in sentence


def test_gemma2_that_is_no_causal_model(tmp_path: Path) -> None:
    make_system(tmp_path, Shape("gemma2", heads=2, kv_heads=1, head_dim=16, hidden=32, layers=2, experts=2))
    for fields, words in (
        ({"sliding_window": 0}, "no positive 'sliding_window'"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ):
        folder = Path(shutil.copytree(tmp_path, tmp_path.parent / f"copy-{words[:2]}"))
        edit(folder / "router/config.json", **fields)
        assert words in refusal(folder, family="gemma2")


def test_no_experts(root: Path) -> None:
    with pytest.raises(InputError, match="at least one expert: name it with --expert NAME=SRC"):
        System.open(FAMILIES["llama3"], str(root / "router"), {})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite(root: Path, value: float) -> None:
    tensor(EMBEDDING, lambda t: t.index_fill(0, torch.tensor([5]), value))(root)
    weights = open_system(root).experts[1].weights
    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight' in .*expert1.* holds values that are not finite; .* again\."):
        weights.read(EMBEDDING)


def test_values_that_a_precision_cannot_hold(root: Path) -> None:
    """Found while writing, named with the model, and nothing is left of what was written."""
    tensor("model.layers.0.mlp.up_proj.weight", lambda t: t.index_fill(0, torch.tensor([5]), 1e5))(root)
    sources = {"a": str(root / "expert0"), "b": str(root / "expert1")}
    out = root / "out" / "bundle"
    request = Request(FAMILIES["llama3"], str(root / "router"), sources, ("fp16",), ("ort:cpu",), out)
    with pytest.raises(InputError) as caught:
        export(request, Stages(Console(quiet=True)))
    for word in ("Expert 'b'", str(root / "expert1"), "up_proj", "cannot be exported as fp16", "65,504", "fp32 or int8"):
        assert word in str(caught.value)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("source", ["some-owner/some-model", "meta-llama/Llama-3.2-1B"])
def test_hub_ids_offline(monkeypatch: pytest.MonkeyPatch, source: str, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UnavailableError, match=f"There is no folder {source}, and the hub cannot be reached .*: go online once, or name a local"
    ):
        Checkpoint.open("router", source, FAMILIES["llama3"])


def failing(error: Exception) -> Callable[..., Any]:
    def download(*_: object, **__: object) -> None:
        raise error

    return download


def test_other_troubles_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    network = type("ConnectError", (Exception,), {"__module__": "httpx"})
    for error in (network("no route"), ConnectionError(), TimeoutError(), OSError("proxy")):
        monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error))
        with pytest.raises(UnavailableError, match="cannot be reached"):
            hub.locate("owner/name")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(full))
    with pytest.raises(OSError, match="No space left on device"):
        hub.locate("owner/name")


@pytest.mark.parametrize("source", ["a--b/c", "-/-", "owner/na..me"])
def test_names_that_are_no_hub_id(source: str) -> None:
    with pytest.raises(InputError, match=r"There is no folder .* no hub id such as owner/name"):
        hub.locate(source)


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "../a", "/no/where", "a/b/c", ""])
def test_folders_that_do_not_exist(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"does not exist \(and is no hub id such as owner/name\)"):
        hub.locate(source)
