"""A causal LM with a routing head: how it is loaded, run and written as a folder that the exporter reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionroute.fr_export.checkpoints.checkpoint import HEAD_FILE, Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.system import read_head
from fusionroute.fr_export.checkpoints.torch_model import torch_model
from fusionroute.fr_export.training.adapters import Adapters
from fusionroute.fr_export.training.recipe import Dtype
from fusionroute.runtime.errors import InputError

HEAD_KEY = "routing_head"
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
SHARD = "5GB"  # of safetensors, as checkpoints are commonly split
_TEXTS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def load_lm(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as a transformers model, whatever its weights come from. A softcap on attention needs the eager one."""
    kind = "eager" if getattr(checkpoint.config, "attn_logit_softcapping", None) else "sdpa"
    return torch_model(checkpoint, dtype, kind)


def lm_logits(lm: Any, hidden: Tensor, vocab: int) -> Tensor:
    """The logits [..., vocab] of final hidden states [..., hidden], with Gemma-2's cap."""
    logits = lm.lm_head(hidden)
    if cap := getattr(lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits[..., :vocab]


def final_hidden(lm: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """The hidden states [T, hidden] after the final norm at `positions` [T] of the flattened `ids` [B, S].

    Only these become logits: over a large vocabulary the logits of all positions would not fit into memory.
    """
    return lm.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, positions)


class Router(nn.Module):
    """The LM and its routing head W, float32 [n, hidden] without bias. Without experts there is no head.

    Where `adapters` is set they alone are trained, and the LM is frozen.
    """

    _keys_to_ignore_on_save = None  # the Trainer asks for it when it resumes from a checkpoint without the frozen weights

    def __init__(self, lm: Any, head: nn.Linear | None, vocab: int, adapters: Adapters | None = None) -> None:
        super().__init__()
        self.lm, self.head, self.vocab, self.adapters = lm, head, vocab, adapters

    @classmethod
    def load(cls, checkpoint: Checkpoint, start: Tensor | None, vocab: int, lora_rank: int = 0, seed: int = 0, base: str = "") -> "Router":
        """Read the LM in float32; the head begins as `start` [n, hidden].

        With `lora_rank` the LM's matrices are frozen under low-rank adapters, which name `base` as their model.
        """
        lm = load_lm(checkpoint)
        adapters = Adapters.new(lm, lora_rank, seed, base) if lora_rank else None
        head = None
        if start is not None:
            head = nn.Linear(start.shape[1], start.shape[0], bias=False)
            head.weight.data = start.clone()
        return cls(lm, head, vocab, adapters)

    def forward(self, ids: Tensor, positions: Tensor, learns_routing: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits [T, vocab] and routing scores w [T, n] at `positions` of the flattened `ids` [B, S].

        The scores are None without a head. With `learns_routing=False` they carry no gradient: they only select an
        expert.
        """
        hidden = final_hidden(self.lm, ids, positions)
        logits = lm_logits(self.lm, hidden, self.vocab)
        if self.head is None:
            return logits, None
        with torch.autocast(hidden.device.type, enabled=False):  # scores stay float32, as the runtime computes them
            routing = self.head(hidden.float())
        return logits, routing if learns_routing else routing.detach()

    def requires_grad_head(self, learns: bool) -> None:
        """Whether the next stage trains the head."""
        if self.head is not None:
            self.head.requires_grad_(learns)

    def trained(self) -> dict[str, Tensor]:
        """Name → parameter, for all parameters that training changes."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad or name.startswith("head.")}

    def weights(self) -> dict[str, Tensor]:
        """The LM's weights by their names in its checkpoint, with adapters merged into them."""
        weights = {}
        for name, tensor in self.lm.state_dict().items():
            if "lora_" in name or (name == "lm_head.weight" and self.lm.config.tie_word_embeddings):
                continue
            layer, adapted, kind = name.rpartition(".base_layer.")
            merged = tensor + self.adapters.difference(layer) if self.adapters and adapted and kind == "weight" else tensor
            weights[name.replace(".base_layer.", ".")] = merged
        return weights


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether a router's checkpoint has a routing head."""
    return f"{HEAD_KEY}.weight" in checkpoint.weights


def start_head(checkpoint: Checkpoint, experts: list[str]) -> Tensor | None:
    """The head float32 [n, hidden] that training starts from.

    It is the checkpoint's own, or zeros, which score all experts alike. None without experts. Raises InputError for a
    head of another number of experts, or with a bias.
    """
    if not experts:
        return None
    if not has_head(checkpoint):
        return torch.zeros(len(experts), checkpoint.config.hidden_size)
    head = read_head(checkpoint, HEAD_KEY, experts)
    if head.bias.any():
        raise InputError(f"{checkpoint.where} has a routing head with a bias, which is not trained: remove its {HEAD_KEY}.bias.")
    return torch.from_numpy(head.weight)


def stored_dtype(checkpoint: Checkpoint) -> Dtype:
    """The dtype of a checkpoint's embedding, taken as that of all weights."""
    return _STORED[checkpoint.weights.entry("model.embed_tokens.weight").dtype]


@torch.no_grad()
def write_router(router: Router, source: Checkpoint, folder: Path, dtype: Dtype, merge: bool) -> None:
    """Write the router into an empty folder: the model, or the adapters alone where it has some and `merge` is off.

    Weights are in `dtype`, the head is in float32. The tokenizer's files, and how logits are fused, are the source's.
    """
    if router.adapters is not None and not merge:
        router.adapters.write(folder, DTYPES[dtype])
    else:
        _write_model(router, source, folder, dtype)
    if router.head is not None:
        head = router.head.weight.detach().float().cpu().contiguous()
        save_file({f"{HEAD_KEY}.weight": head}, folder / HEAD_FILE)
        # a curve of λ was measured with the head that this one replaces
        FusionSettings.read(source.folder).model_copy(update={"lam_curve": None}).write(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only
    copy_texts(source.folder, folder)


def _write_model(router: Router, source: Checkpoint, folder: Path, dtype: Dtype) -> None:
    weights = {name: tensor.to("cpu", DTYPES[dtype]).contiguous() for name, tensor in router.weights().items()}
    save_torch_state_dict(weights, folder, max_shard_size=SHARD)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def copy_texts(source: Path, folder: Path) -> None:
    """Copy the files beside a checkpoint's weights and config: tokenizer, chat template, generation config."""
    for pattern in _TEXTS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
