"""Folders of pickled weights: refused, with a command that converts them."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusionroute.fr_export.checkpoints.checkpoint import Checkpoint
from fusionroute.runtime.errors import InputError
from tests.support.systems import Shape, make_model


@pytest.mark.parametrize("tokenizer", [False, True])
def test_the_command_that_the_refusal_names_converts_the_folder(tokenizer: bool, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "my model", Shape(layers=1, tokenizer=tokenizer), 0, expert=True)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds pickled weights \(pytorch_model.bin\) only; convert them") as caught:
        Checkpoint.open("math", str(folder))
    sentence = re.fullmatch(r".* convert them to safetensors: (python -c .*), and name (.*) instead\.", str(caught.value))
    assert sentence is not None
    exec(shlex.split(sentence[1])[2], {})  # in this process, which has transformers already
    checkpoint = Checkpoint.open("math", sentence[2])
    assert all(torch.equal(torch.from_numpy(checkpoint.weights.read(name)), tensor) for name, tensor in tensors.items())
    assert (checkpoint.tokenizer is not None) == tokenizer and not list(Path(sentence[2]).glob("*.bin"))
