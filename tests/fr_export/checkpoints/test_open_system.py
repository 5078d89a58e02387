"""Systems of whole checkpoints open; options and values that do not fit them are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusionroute.fr_export.checkpoints.system import DEFAULT_CONTEXT, System
from fusionroute.fr_export.console.progress import Stages
from fusionroute.fr_export.export import Request, export
from fusionroute.fr_export.families import FAMILIES
from fusionroute.runtime.errors import InputError
from tests.support.damaged_checkpoints import EMBEDDING, edit, open_system, refusal, shard, tensor, without_tokenizers
from tests.support.systems import Shape, make_system


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
        ({"sliding_window": 0}, "'sliding_window' of 0"),
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


def test_a_context_beyond_longropes_original_length_is_refused(tmp_path: Path) -> None:
    """Its tables hold the frequencies of texts up to there."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = {"original_max_position_embeddings": 256, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4} | factors}
    router, experts = make_system(tmp_path, Shape("phi3", layers=1, experts=1, config=config))
    assert System.open(None, router, experts).max_seq_len == 256
    beyond = r"was trained for 2 to 256 positions; beyond them its longrope takes other rotary frequencies\.$"
    with pytest.raises(InputError, match=rf"^--max-seq-len 257 does not fit: The router \(.*\) {beyond}"):
        System.open(None, router, experts, max_seq_len=257)
