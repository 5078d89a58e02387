"""A PEFT LoRA folder: its tensors by module, its texts, and what the report says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusionroute.fr_export.checkpoints.chat_template_files import FOLDER as TEMPLATES
from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import FLOATS, tensors_of
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE, LoraConfig
from fusionroute.runtime.adapters.peft_names import sort_names, text_name
from fusionroute.runtime.errors import InputError

WEIGHTS_FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class ModuleAdapter:
    """What an adapter has for one module: part → tensor, and how B·A counts."""

    parts: Mapping[str, StoredTensor]
    rank: int
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter: by the names of the language model alone, its modules, and the tensors that it brings whole."""

    folder: Path
    where: str
    config: LoraConfig
    modules: Mapping[str, ModuleAdapter]
    whole: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path, where: str) -> "LoraAdapter":
        """Read the headers of an adapter. Raises InputError for one that is incomplete or cannot be merged."""
        config = LoraConfig.read(folder, where)
        file, pickle = folder / WEIGHTS_FILE, folder / PICKLE
        if not file.is_file():
            if pickle.is_file():
                raise InputError(
                    f"{where} holds pickled weights ({PICKLE}) only; convert them to safetensors, which cannot run code: python -c "
                    f"\"import torch, safetensors.torch as s; t = torch.load('{pickle}', weights_only=True, map_location='cpu'); "
                    f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, '{file}')\"."
                )
            raise InputError(
                f"{where} holds {CONFIG_FILE} but no {WEIGHTS_FILE}: save it again, or download all of it (hf download) and name that folder."
            )
        tensors = tensors_of(file)
        for key, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                raise InputError(f"{where} has '{key}' as {tensor.dtype}; expected fp32, fp16 or bf16: save the adapter again.")
        names = sort_names(tensors, where)
        adapted = {
            text_name(module): ModuleAdapter({part: tensors[key] for part, key in parts.items()}, config.rank(module), config.scale(module))
            for module, parts in names.modules.items()
        }
        whole = {name: tensors[key] for name, key in names.whole.items()}
        return cls(folder, where, config, adapted, whole)

    def texts(self, base: Mapping[str, Path], own: Mapping[str, Path]) -> dict[str, Path]:
        """The text files of the adapted model: its own before those of its base, but for config.json.

        Where the adapter has a tokenizer_config.json, the base's chat template does not count: it belongs to the other
        tokenizer_config.json.
        """
        own = {name: file for name, file in own.items() if name != "config.json"}
        inherited = {name: file for name, file in base.items() if not (is_template(name) and "tokenizer_config.json" in own)}
        return inherited | own

    def report(self, base: SourceReport) -> SourceReport:
        """What stands in the report about the adapted model. `base`: what stands there about the base."""
        adapted = [module for module in self.modules.values() if {"lora_A", "lora_embedding_A"} & module.parts.keys()]
        notes = [f"an adapter of a base of {base.bytes / 1e6:,.1f} MB ({', '.join(base.dtypes)})"]
        if adapted:
            kind, ranks = "DoRA" if self.config.use_dora else "LoRA", sorted({module.rank for module in adapted})
            notes.append(f"{kind} of rank {', '.join(map(str, ranks))} on {len(adapted)} modules, merged while weights are read")
        if self.whole:
            notes.append(f"{len(self.whole)} tensors of its adapter stand in place of the base's")
        tensors = [*self.whole.values(), *(tensor for module in self.modules.values() for tensor in module.parts.values())]
        return SourceReport.of("adapter", tensors, (*notes, *(f"of its base: {note}" for note in base.notes)))


def is_template(name: str) -> bool:
    """Whether a text of a checkpoint holds nothing but chat templates."""
    return name.startswith(("chat_template", TEMPLATES))
