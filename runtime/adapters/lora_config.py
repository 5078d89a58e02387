"""adapter_config.json of a PEFT LoRA adapter: what each of its fields means here, and which are refused."""

import math
import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fusionroute.runtime.errors import InputError

Number = TypeVar("Number", int, float)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")  # of PEFT, and of MLX

# Fields that only training reads, or that the names and shapes of the stored tensors say already.
UNREAD = {
    "peft_version", "auto_mapping", "inference_mode", "runtime_config", "target_modules", "exclude_modules", "lora_dropout",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "bias",
    "fan_in_fan_out",  # PEFT itself ignores it for linear layers, and all supported families have no others
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # settings of the start; `init_lora_weights` says which
    "velora_config",  # changes the backward pass only
}  # fmt: skip

# Fields that change what the model computes in a way that no merged weight can have, or that none needed so far.
REFUSED = {
    "alora_invocation_tokens": "applies its weights to some tokens only (aLoRA)",
    "arrow_config": "chooses among adapters per token (Arrow)",
    "kasa_config": "cuts singular values off its base (KaSA)",
    "layer_replication": "repeats layers of its base",
    "megatron_config": "was trained on Megatron's layers",
    "monteclora_config": "samples its weights (MonteCLoRA)",
    "target_parameters": "adapts parameters instead of modules",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "averages groups of inputs (QA-LoRA)",
}

# Values of init_lora_weights that leave the base as it is. Others put back only a part of its weights: PiSSA, OLoRA, …
STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}


def is_adapter(folder: Path, where: str, source: str) -> bool:
    """Whether a folder holds an adapter. `source` is what the user called it.

    Raises InputError for one that holds a whole model too, that has adapters in subfolders only, or weights of one
    without its config.
    """
    if (folder / CONFIG_FILE).is_file():
        if models := [name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).is_file()]:
            raise InputError(
                f"{where} holds a whole model ({models[0]}) and an adapter ({CONFIG_FILE}): put one of them into a folder of its own."
            )
        return True
    if (folder / "config.json").is_file():
        return False
    if weights := next((name for name in WEIGHTS_FILES if (folder / name).is_file()), None):
        raise InputError(f"{where} is an adapter ({weights}) without its {CONFIG_FILE}: save or download all of it again.")
    if adapters := sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}")):
        raise InputError(f"{where} holds several adapters ({', '.join(adapters)}): name one of them, such as {source}/{adapters[0]}.")
    return False


class LoraConfig(BaseModel):
    """The fields that the merged weights depend on."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str | None = True
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None

    @classmethod
    def read(cls, folder: Path, where: str) -> "LoraConfig":
        """The config in an adapter folder. Raises InputError for a broken one, and names what cannot be merged."""
        try:
            config = cls.model_validate_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            about = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, about['loc'])) or 'the file'}: {about['msg']}" if about else error
            raise InputError(f"{where} has a broken {CONFIG_FILE} ({reason}); save or download the adapter again.") from error
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise InputError for an adapter that is no LoRA adapter of a causal LM, or one that cannot be merged."""
        mend = "merge it into its base with PEFT's merge_and_unload and name the merged model"
        if self.peft_type != "LORA":
            raise InputError(f"{where} is an adapter of type {self.peft_type}; expected LORA: {mend} if its type can be merged.")
        if self.task_type not in (None, "CAUSAL_LM"):
            raise InputError(f"{where} is an adapter for the task {self.task_type}; expected CAUSAL_LM: name one of a language model.")
        if str(self.init_lora_weights).lower() not in STARTS:
            raise InputError(
                f"{where} began with init_lora_weights={self.init_lora_weights!r}, which changes the base too: save it again with PEFT's "
                f"path_initial_model_for_weight_conversion, or {mend}."
            )
        for name, value in (self.model_extra or {}).items():
            if not value or name in UNREAD:
                continue
            if name in REFUSED:
                raise InputError(f"{where} {REFUSED[name]}: its {CONFIG_FILE} sets {name}, which cannot be merged; name another adapter.")
            raise InputError(f"{where} sets {name} in its {CONFIG_FILE}, which this version does not know: {mend}.")

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return by_pattern(self.rank_pattern or {}, module, self.r)

    def scale(self, module: str) -> float:
        """What a module's B·A is multiplied by: alpha / rank, or alpha / √rank for rsLoRA (arXiv:2312.03732)."""
        rank, alpha = self.rank(module), by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether the adapter brings a whole copy of a module."""
        return any(module.endswith(name) for name in self.modules_to_save or [])

    def tokens(self, module: str) -> tuple[int, ...]:
        """The ids whose rows of an embedding or head the adapter replaces, in the order of its tensor."""
        indices: Any = self.trainable_token_indices or {}
        if isinstance(indices, list):
            return tuple(indices)
        return next((tuple(ids) for name, ids in indices.items() if module.endswith(name)), ())


def by_pattern(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that a module's name ends with, as PEFT matches them."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
