"""A PEFT LoRA folder as low-rank factors of its base's matrices, and as norms in place of its base's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusionroute.runtime.adapters.factor_layout import Factor
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE, LoraConfig, is_adapter
from fusionroute.runtime.adapters.peft_names import sort_names, text_name
from fusionroute.runtime.errors import InputError, one_line
from fusionroute.runtime.tensor_file import Stored, TensorFile

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraAdapter:
    """`factors`: of matrices, by the names of a checkpoint's tensors. `whole`: other tensors that it brings."""

    where: str
    factors: Mapping[str, Factor]
    shapes: Mapping[str, tuple[int, int]]  # [N, K] of the matrices
    whole: Mapping[str, Stored]

    @classmethod
    def open(cls, folder: Path, name: str) -> "LoraAdapter":
        """Map an adapter; `name` is that of the expert, for messages.

        Raises InputError for a folder that holds no LoRA adapter, or one that is more than factors and norms.
        """
        where = f"Expert '{name}' ({folder})"
        if not folder.is_dir():
            raise InputError(f"There is no adapter folder {folder}: name one, or first download it from a hub (hf download).")
        if not is_adapter(folder, where, str(folder)):
            raise InputError(f"{where} holds no {CONFIG_FILE}: expected the folder of a LoRA adapter, as PEFT writes it.")
        config = LoraConfig.read(folder, where)
        if config.use_dora:
            raise InputError(f"{where} is a DoRA adapter, which no low-rank factors alone can be: train it without use_dora.")
        try:
            tensors = TensorFile(folder / WEIGHTS_FILE).tensors
        except (OSError, ValueError) as error:
            raise InputError(
                f"{where} has no complete {WEIGHTS_FILE} in fp32, fp16 or bf16 ({one_line(error)}): save or download it again."
            ) from error
        names = sort_names(tensors, where)
        factors, shapes = {}, {}
        for module, parts in names.modules.items():
            tensor = f"{text_name(module)}.weight"
            if parts.keys() != {"lora_A", "lora_B"}:
                odd = next(part for part in (*parts, "lora_A", "lora_B") if part not in ("lora_A", "lora_B") or part not in parts)
                raise InputError(
                    f"{where} {'has' if odd in parts else 'lacks'} the {odd} of '{module}'; an expert that shares a base has low-rank "
                    "factors of the matrices of its layers, and norms: train it so."
                )
            a, b, rank = tensors[parts["lora_A"]], tensors[parts["lora_B"]], config.rank(module)
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
                raise InputError(
                    f"{where} has factors of shapes {list(b.shape)} and {list(a.shape)} for '{module}', and rank {rank} in its "
                    f"{CONFIG_FILE}: save or download the adapter again."
                )
            factors[tensor] = _factor(a, b, config.scale(module), f"'{module}' of {where}")
            shapes[tensor] = b.shape[0], a.shape[1]
        return cls(where, factors, shapes, {name: tensors[key] for name, key in names.whole.items()})


def _factor(a: Stored, b: Stored, scale: float, what: str) -> Factor:
    def read() -> tuple[np.ndarray, np.ndarray]:
        return finite(a.values(), what), finite(b.values(), what) * np.float32(scale)

    return Factor(a.shape[0], read)


def finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values. Raises InputError where one is not finite."""
    if not np.isfinite(values).all():
        raise InputError(f"A tensor for {what} holds values that are not finite; train or download it again.")
    return values
