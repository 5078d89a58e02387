"""LoRA adapters (arXiv:2106.09685) in the model that is trained, through peft, and the folder that holds them alone."""

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fusionroute.fr_export.checkpoints.sources.lora import WEIGHTS_FILE

_NAME = "default"


@dataclass(frozen=True)
class Adapters:
    """The adapters of one LM.

    `model` is the peft.PeftModel that wraps the LM; the LM's own modules are replaced in place. `base` is the folder or
    hub id that adapter_config.json names.
    """

    model: Any
    base: str

    @classmethod
    def new(cls, lm: Any, rank: int, seed: int, base: str) -> "Adapters":
        """Put adapters of a rank into all linear layers except the LM head, and freeze everything else.

        They change nothing yet: B is zero. `seed` draws A.
        """
        import peft

        torch.manual_seed(seed)
        layers = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(layers - {"lm_head"}), task_type="CAUSAL_LM")
        return cls(peft.get_peft_model(lm, config, adapter_name=_NAME), base)

    @classmethod
    def read(cls, lm: Any, folder: Path, base: str) -> "Adapters":
        """The adapters of a PEFT folder, to be trained further; everything else is frozen."""
        import peft

        return cls(peft.PeftModel.from_pretrained(lm, folder, adapter_name=_NAME, is_trainable=True), base)

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what `peft.PeftModel.from_pretrained` reads: the adapters' weights in `dtype`, and their config."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self.model, adapter_name=_NAME, save_embedding_layers=False)
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
        config = copy(self.model.peft_config[_NAME])
        config.inference_mode, config.base_model_name_or_path = True, self.base
        config.save_pretrained(folder)
