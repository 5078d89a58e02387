"""Where adapters, their bases and their texts are found; what is refused, each in one sentence that names the thing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints import hub
from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.system import System
from fusionroute.fr_export.training.expert_cache import model_digest
from fusionroute.runtime.errors import FusionError, InputError
from tests.support.adapters import SHAPE, make_adapted_system, make_adapter
from tests.support.damaged_checkpoints import edit, retensor, then
from tests.support.systems import Shape, make_model

Q = "base_model.model.model.layers.0.self_attn.q_proj"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    make_adapted_system(folder, SHAPE, [{}, {}, {"use_dora": True}])
    return folder


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """Folders base, router, expert0 and expert1 (DoRA), to be damaged."""
    for name in ("base", "router", "expert0", "expert1"):
        shutil.copytree(written / name, tmp_path / name)
        if name != "base":
            edit(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def refusal(source: Path | str, kind: type[FusionError] = InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.open("expert0", str(source), **options)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def config(**fields: Any) -> Damage:
    return lambda folder: edit(folder / "adapter_config.json", **fields)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    return lambda folder: retensor(folder / "adapter_model.safetensors", change)


def moved(old: str, new: str) -> Damage:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def cast(name: str, dtype: torch.dtype) -> Damage:
    return tensors(lambda t: t.update({name: t[name].to(dtype)}))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "IA3": (config(peft_type="IA3"), "of type IA3; expected LORA"),
    "prefix": (config(peft_type="PREFIX_TUNING"), "of type PREFIX_TUNING; expected LORA"),
    "AdaLoRA": (config(peft_type="ADALORA"), "of type ADALORA; expected LORA"),
    "weights alone": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "is an adapter (adapter_model.safetensors) without its adapter_config.json: save or download all of it again.",
    ),
    "classifier": (config(task_type="SEQ_CLS"), "for the task SEQ_CLS; expected CAUSAL_LM"),
    "PiSSA": (config(init_lora_weights="pissa_niter_16"), "init_lora_weights='pissa_niter_16', which changes the base"),
    "OLoRA": (config(init_lora_weights="olora"), "init_lora_weights='olora', which changes the base"),
    "LoftQ": (config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights='loftq', which changes the base"),
    "CorDA": (config(init_lora_weights="corda"), "init_lora_weights='corda', which changes the base"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "init_lora_weights='lora_ga', which changes the base"),
    "QA-LoRA": (config(use_qalora=True), "sets use_qalora, which cannot be merged"),
    "aLoRA": (config(alora_invocation_tokens=[4, 5]), "sets alora_invocation_tokens, which cannot be merged"),
    "Arrow": (config(arrow_config={"top_k": 2}), "sets arrow_config, which cannot be merged"),
    "BD-LoRA": (config(use_bdlora={"nblocks": 2}), "sets use_bdlora, which cannot be merged"),
    "KaSA": (config(kasa_config={"beta": 1e-4}), "sets kasa_config, which cannot be merged"),
    "MonteCLoRA": (config(monteclora_config={"num_samples": 8}), "sets monteclora_config, which cannot be merged"),
    "replicated layers": (config(layer_replication=[[0, 1], [0, 1]]), "sets layer_replication, which cannot be merged"),
    "parameters": (config(target_parameters=["mlp.experts.gate_up_proj"]), "sets target_parameters, which cannot be merged"),
    "Megatron": (config(megatron_config={"hidden_size": 32}), "sets megatron_config, which cannot be merged"),
    "a field of tomorrow": (config(use_tomorrow=True), "sets use_tomorrow in its adapter_config.json, which this version does not know"),
    "no base": (config(base_model_name_or_path=None), "names no base: name it with --base"),
    "a base that is gone": (config(base_model_name_or_path="/no/where"), "is an adapter of /no/where, which cannot be opened"),
    "a rank that is no number": (config(r="many"), "has a broken adapter_config.json (r: "),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "has a broken adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors"),
    "half a file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:900]),
        "adapter_model.safetensors is not a complete safetensors file",
    ),
    "empty": (tensors(lambda t: t.clear()), "holds no tensors in its adapter_model.safetensors"),
    "one factor": (tensors(lambda t: t.pop(f"{Q}.lora_A.weight")), "lacks the lora_A of 'model.layers.0.self_attn.q_proj'"),
    "another rank": (config(r=8), "rank 8 of its adapter_config.json"),
    "an unknown part": (moved(f"{Q}.lora_A.weight", f"{Q}.lora_C.weight"), "lora_C.weight', which this version does not know"),
    "another module": (
        tensors(lambda t: t.update({name.replace("q_proj", "qkv_proj"): t.pop(name) for name in list(t) if "q_proj" in name})),
        "adapts 'model.layers.0.self_attn.qkv_proj', which its base lacks",
    ),
    "another tensor": (
        tensors(lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)})),
        "brings the tensor 'score.weight', which its base lacks",
    ),
    "another width": (
        tensors(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(31)})),
        "has 'model.norm.weight' of shape [31]; its base has [32]",
    ),
    "an embedding without its head": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(310, 32)})),
        "resizes model.embed_tokens.weight to 310 and lm_head.weight to 300 rows",
    ),
    "no magnitudes": (config(use_dora=True), "lacks the lora_magnitude_vector of 'model.layers.0.mlp.down_proj'"),
    "magnitudes of another length": (
        then(
            config(use_dora=True),
            tensors(
                lambda t: t.update({n.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3) for n in list(t) if "lora_A" in n})
            ),
        ),
        "has the lora_magnitude_vector of 'model.layers.0.mlp.down_proj' in shape [3]; its base needs [32]",
    ),
    "a bias that the base lacks": (
        tensors(lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)})),
        "adds a bias to 'model.layers.0.self_attn.q_proj' (lora_bias), which has none in its base",
    ),
    "rows without ids": (
        tensors(lambda t: t.update({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)})),
        "rows of shape [2, 32] for the 0 trainable_token_indices of 'model.embed_tokens'",
    ),
    "8-bit factors": (cast(f"{Q}.lora_A.weight", torch.float8_e4m3fn), "as F8_E4M3; expected fp32, fp16 or bf16"),
    "a whole model beside it": (
        lambda folder: shutil.copy(folder.parent / "base/model.safetensors", folder),
        "holds a whole model (model.safetensors) and an adapter",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refusals(damage: str, root: Path) -> None:
    change, words = DAMAGES[damage]
    change(root / "expert0")
    sentence = refusal(root / "expert0")
    assert words in sentence, sentence
    assert "Expert 'expert0'" in sentence or "adapter_model.safetensors" in sentence, sentence


def test_values_that_are_not_finite_name_the_adapter(root: Path) -> None:
    retensor(root / "expert0/adapter_model.safetensors", lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")))
    checkpoint = Checkpoint.open("expert0", str(root / "expert0"))
    with pytest.raises(InputError, match=r"q_proj.weight' in .*expert0/adapter_model.safetensors holds values that are not finite"):
        checkpoint.weights.read("model.layers.0.self_attn.q_proj.weight")


def test_the_command_that_converts_pickles_does(root: Path) -> None:
    file = root / "expert0/adapter_model.safetensors"
    stored = load_file(file)
    file.unlink()
    torch.save(stored, root / "expert0/adapter_model.bin")
    sentence = refusal(root / "expert0")
    program = sentence.split('python -c "')[1].removesuffix('".')
    exec(program, {})  # the message's own words, which hold no quotes that a shell reads
    assert load_file(file).keys() == stored.keys()
    assert Checkpoint.open("expert0", str(root / "expert0")).source.kind == "adapter"


def test_bases(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one on the command line comes first; the adapter's own may lie beside it; an adapter is no base."""
    other = make_model(root / "other", SHAPE, 9, expert=False)
    named = Checkpoint.open("expert0", str(root / "expert0"), base=str(other))
    assert named.file("config.json") == other / "config.json"
    edit(root / "expert0/adapter_config.json", base_model_name_or_path="../base")
    monkeypatch.chdir(root)  # where there is no "../base"
    assert Checkpoint.open("expert0", str(root / "expert0")).weights.files >= {root / "base/model.safetensors"}
    assert "is an adapter over another adapter" in refusal(root / "expert0", base=str(root / "expert1"))
    assert "the hub knows no such" in refusal_of_hub(root, monkeypatch)
    wide = make_model(root / "wide", Shape(heads=2, kv_heads=1, head_dim=16, hidden=64, layers=1), 0, expert=False)
    assert "name the base that it was trained on" in refusal(root / "expert0", base=str(wide))
    edit(root / "base/config.json", quantization_config={"quant_method": "aqlm"})
    assert "quantised by 'aqlm'" in (sentence := refusal(root / "expert1")) and sentence.endswith("or name another base with --base.")
    deep = Checkpoint.open("expert0", str(root / "expert0"), base=str(make_model(root / "deep", SHAPE, 1, expert=False)))
    assert deep.config.num_hidden_layers == 1


def refusal_of_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    edit(root / "expert0/adapter_config.json", base_model_name_or_path="owner/base", revision="abc")
    asked: list[tuple[str, str | None, str | None]] = []

    def download(*request: str | None) -> Path:
        asked.append(request)  # type: ignore[arg-type]
        raise InputError("There is no folder owner/base, and the hub knows no such repository.")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "download", download)
        sentence = refusal(root / "expert0")
    assert asked == [("owner/base", None, "abc")], "the revision that the adapter was trained on"
    assert "name its base with --base" in sentence
    return sentence


def test_a_base_that_nobody_needs(root: Path) -> None:
    make_model(root / "whole", SHAPE, 1, expert=True)
    head = load_file(root / "router/routing_head.safetensors")["routing_head.weight"]
    save_file({"routing_head.weight": head[:1].clone()}, root / "base/routing_head.safetensors")
    with pytest.raises(InputError, match="all models of this system are whole ones: leave --base out"):
        System.open(None, str(root / "base"), {"whole": str(root / "whole")}, base=str(root / "base"))


def test_several_adapters_in_one_folder(root: Path) -> None:
    """PEFT writes the adapter `default` at the top and others into folders below, which are named as paths."""
    folder = root / "several"
    math = make_adapter(root / "base", folder, name="math")
    make_adapter(root / "base", folder, name="code")
    assert math == folder / "math"
    assert f"holds several adapters (code, math): name one of them, such as {folder}/code." in refusal(folder)
    assert Checkpoint.open("math", str(math)).source.kind == "adapter"
    shutil.copytree(root / "expert0", folder, dirs_exist_ok=True)
    top = Checkpoint.open("top", str(folder))
    assert top.weights.files == {folder / "adapter_model.safetensors", root / "base/model.safetensors"}


def test_texts(root: Path) -> None:
    """The adapter's before the base's, but for config.json; fusion.json and the routing head lie beside the adapter."""
    router = Checkpoint.open("router", str(root / "router"), head_key="routing_head")
    assert router.file("tokenizer.json") == root / "base/tokenizer.json"
    assert "routing_head.weight" in router.weights
    base_template = router.chat_template
    (root / "router/config.json").write_text("{}")
    (root / "router/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    (root / "router/tokenizer_config.json").write_text(json.dumps({"chat_template": "its own"}))
    own = Checkpoint.open("router", str(root / "router"), head_key="routing_head")
    assert own.file("config.json") == root / "base/config.json"
    assert own.end_tokens == [2, 9]
    assert own.chat_template == "its own" != base_template
    assert own.files >= {root / "router/adapter_config.json", root / "base/config.json"}


@pytest.mark.parametrize("changed", ["expert0/adapter_config.json", "expert0/adapter_model.safetensors", "base/model.safetensors"])
def test_caches_tell_adapters_and_bases_apart(changed: str, root: Path) -> None:
    """Whatever changes the merged weights changes the name of what was computed from them."""
    before = model_digest(Checkpoint.open("expert0", str(root / "expert0")))
    if changed.endswith(".json"):
        edit(root / changed, lora_alpha=9)
    else:
        retensor(root / changed, lambda t: next(iter(t.values())).add_(1))
    assert model_digest(Checkpoint.open("expert0", str(root / "expert0"))) != before


def test_the_report_of_a_source(root: Path) -> None:
    dora, base = Checkpoint.open("expert1", str(root / "expert1")), Checkpoint.open("base", str(root / "base"))
    assert (dora.source.kind, dora.source.dtypes) == ("adapter", ("F32",))
    assert dora.source.bytes == (root / "expert1/adapter_model.safetensors").stat().st_size
    assert "DoRA of rank 4 on 7 modules, merged while weights are read" in dora.source.notes
    assert (base.source.kind, base.source.bytes) == ("full", (root / "base/model.safetensors").stat().st_size)


@pytest.mark.parametrize(
    ("source", "folder", "allowed", "refused"),
    [
        ("owner/name", "", ["adapter_config.json", "adapter_model.safetensors", "math/adapter_config.json"], ["math/adapter_model.safetensors"]),
        ("owner/name/math", "math", ["math/adapter_config.json", "math/adapter_model.safetensors"], ["adapter_model.safetensors", "math/a/b.safetensors"]),
    ],
)  # fmt: skip
def test_what_is_downloaded(
    source: str, folder: str, allowed: list[str], refused: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository its top, and which adapters it has below; of a folder in it that folder only."""
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(repository: str, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None) -> str:
        assert (repository, revision) == ("owner/name", "main")
        files = filter_repo_objects([*allowed, *refused, "math/README.md"], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert sorted(files) == sorted(allowed)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: [])
    (tmp_path / "snapshot" / folder).mkdir(parents=True, exist_ok=True)
    if folder:
        with pytest.raises(InputError, match="The hub's owner/name has no folder math with a checkpoint"):
            hub.locate(source, "main")
        (tmp_path / folder).mkdir()
    assert hub.locate(source, "main") == tmp_path / folder
