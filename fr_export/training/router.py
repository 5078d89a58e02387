"""A causal LM with a routing head: how it is loaded, run and written as a folder that the exporter reads."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionroute.fr_export.checkpoints.checkpoint import HEAD_FILE, Checkpoint
from fusionroute.fr_export.checkpoints.fusion_settings import FusionSettings
from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.checkpoints.sources.adapter_base import locate_base
from fusionroute.fr_export.checkpoints.sources.lora import LoraAdapter
from fusionroute.fr_export.checkpoints.system import read_head
from fusionroute.fr_export.checkpoints.torch_model import read_as, torch_model
from fusionroute.fr_export.training.adapters import Adapters
from fusionroute.fr_export.training.recipe import Dtype
from fusionroute.runtime.errors import InputError

HEAD_KEY = "routing_head"
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
SHARD = "5GB"  # of safetensors, as checkpoints are commonly split
_TEXTS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*", "processor_config.json",
    "generation_config.json", "*.model",
)  # fmt: skip


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
    def load(
        cls, checkpoint: Checkpoint, start: Tensor | None, vocab: int, lora_rank: int = 0, seed: int = 0, base: str | None = None
    ) -> "Router":
        """Read the LM in float32; the head begins as `start` [n, hidden].

        With `lora_rank` the LM is frozen under adapters: those of the checkpoint where it is an adapter itself, else new
        ones. `base` is the folder or hub id of the model under them; None takes the one that the checkpoint's adapter
        names.
        """
        if not lora_rank:
            lm, adapters = load_lm(checkpoint), None
        elif checkpoint.source.kind == "adapter":
            adapter = LoraAdapter.open(checkpoint.folder, checkpoint.where)
            folder = locate_base(adapter.config, checkpoint.folder, checkpoint.where, base)
            lm = load_lm(Checkpoint.open("base", str(folder)))
            adapters = Adapters.read(lm, checkpoint.folder, base or adapter.config.base_model_name_or_path or str(folder))
        else:
            lm = load_lm(checkpoint)
            adapters = Adapters.new(lm, lora_rank, seed, base or str(checkpoint.folder))
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
    if router.adapters is None:
        _write_model(router.lm.state_dict(), source, folder, dtype)
    elif merge:
        with TemporaryDirectory() as alone:
            router.adapters.write(Path(alone), torch.float32)
            merged = Checkpoint.open("merged", alone, base=router.adapters.base).weights
            _write_model({name: read_as(merged, name, DTYPES[dtype]) for name in merged.entries}, source, folder, dtype)
    else:
        router.adapters.write(folder, DTYPES[dtype])
    if router.head is not None:
        head = router.head.weight.detach().float().cpu().contiguous()
        save_file({f"{HEAD_KEY}.weight": head}, folder / HEAD_FILE)
        # a curve of λ was measured with the head that this one replaces
        FusionSettings.read(source.folder).model_copy(update={"lam_curve": None}).write(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only
    copy_texts(source, folder)


def _write_model(weights: Mapping[str, Tensor], source: Checkpoint, folder: Path, dtype: Dtype) -> None:
    tied = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    stored = {name: tensor.to("cpu", DTYPES[dtype]).contiguous() for name, tensor in weights.items() if name not in tied}
    save_torch_state_dict(stored, folder, max_shard_size=SHARD)
    config = read_json(source.texts["config.json"], source.where)
    config.pop("torch_dtype", None)  # the older name
    # an adapter may part the head from the embedding, and add tokens
    config |= {"dtype": dtype, "tie_word_embeddings": source.config.tie_word_embeddings, "vocab_size": source.config.vocab_size}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_texts(source: Checkpoint, folder: Path) -> None:
    """Copy the files beside a checkpoint's weights and config: tokenizer, chat template, generation config."""
    for name, file in source.texts.items():
        if any(fnmatch(name, pattern) for pattern in _TEXTS):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
