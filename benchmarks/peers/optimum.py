"""Optimum with ONNX Runtime: its own export of the checkpoint, loaded by ORTModelForCausalLM."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

from benchmarks.peers.worker import Generation, main, stepwise


def build(checkpoint: Path, form: str, out: Path) -> None:
    """Export in fp32, Optimum's only precision for decoders.

    Optimum needs transformers 4, which does not read `rope_parameters`, where transformers 5 stores the base of the
    rotary embedding.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"]}
    with TemporaryDirectory() as folder:
        for file in checkpoint.iterdir():
            (Path(folder) / file.name).symlink_to(file.resolve())
        (Path(folder) / "config.json").unlink()
        (Path(folder) / "config.json").write_text(json.dumps(config))
        ORTModelForCausalLM.from_pretrained(folder, export=True, use_cache=True).save_pretrained(out)


class Optimum:
    """An exported folder.

    It is called directly, since `generate` adds more work per token than the calls themselves cost.
    """

    def __init__(self, folder: str, form: str, context: int, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def _read(self, ids: list[int], past: object, length: int) -> tuple[torch.Tensor, object]:
        mask = torch.ones((1, length + len(ids)), dtype=torch.long)
        places = torch.arange(length, length + len(ids))[None]
        out = self.model(torch.tensor([ids]), attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True)
        return out.logits[0], out.past_key_values

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        past, length = None, 0

        def step(ids: list[int]) -> int:
            nonlocal past, length
            logits, past = self._read(ids, past, length)
            length += len(ids)
            return int(logits[-1].argmax())

        return stepwise(prompt, count, step)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`."""
        return np.asarray(self._read(ids, None, 0)[0])


if __name__ == "__main__":
    main(Optimum, build)
