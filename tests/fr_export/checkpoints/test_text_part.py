"""The language model of a checkpoint that also reads images."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from tests.support.systems import Shape

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89, 144, 233] * 3])
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}


@pytest.fixture(params=["language_model.model.", "model.language_model."])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Gemma 3 that reads images, in the older and the newer layout of its tensors."""
    torch.manual_seed(0)
    special = {"image_token_index": 299, "boi_token_index": 297, "eoi_token_index": 298, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=Shape("gemma3").build(expert=False).to_dict(), vision_config=VISION, **special)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("language_model.model.", request.param): tensor for name, tensor in tensors.items()}
    assert any(name.startswith(request.param) for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_it_is_opened_alone_and_computes_what_the_whole_does(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gemma3"
    checkpoint = Checkpoint.open("math", str(folder))
    assert checkpoint.family.name == "gemma3" and checkpoint.config.model_type == "gemma3_text"
    assert not any("vision" in name or "projector" in name for name in checkpoint.weights.entries)
    (note,) = checkpoint.source.notes
    stored = load_file(folder / "model.safetensors")
    others = [name for name in stored if "language_model" not in name]
    assert others and note == f"its language model alone: {len(others)} tensors that read images are left out"
    whole = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(torch_model(checkpoint)(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=0)
