"""A PEFT LoRA folder: its tensors by module, put over the tensors of its base."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.sources.lora_config import CONFIG_FILE, LoraConfig
from fusionroute.fr_export.checkpoints.sources.low_rank import (
    AddedTensor,
    ColumnNormTensor,
    LowRankTensor,
    ReplacedRowsTensor,
    RowNormTensor,
    TransposedTensor,
)
from fusionroute.fr_export.checkpoints.tensors import StoredTensor
from fusionroute.fr_export.checkpoints.weights import FLOATS, tensors_of
from fusionroute.runtime.errors import InputError

WEIGHTS_FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PREFIX = "base_model.model."
# behind a module's name: parts of an adapter of it
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.weight)?"
)
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|original_module)\.")  # PEFT's modules around the base's own


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter: module → part → tensor, and the tensors that it brings whole."""

    folder: Path
    where: str
    config: LoraConfig
    modules: Mapping[str, Mapping[str, StoredTensor]]
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
            raise InputError(f"{where} holds {CONFIG_FILE} but no {WEIGHTS_FILE}; save or download the adapter again.")
        modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        whole: dict[str, StoredTensor] = {}
        for key, tensor in tensors_of(file).items():
            if tensor.dtype not in FLOATS:
                raise InputError(f"{where} has '{key}' as {tensor.dtype}; expected fp32, fp16 or bf16: save the adapter again.")
            name = key.removeprefix(PREFIX)
            if part := PART.fullmatch(name):
                modules[part[1]][part[2]] = tensor
            elif "lora_" in name:
                raise InputError(f"{where} has the tensor '{key}', which this version does not know: merge it with PEFT first.")
            else:
                whole[WRAPPERS.sub(".", name)] = tensor
        if not modules and not whole:
            raise InputError(f"{where} holds no tensors in its {WEIGHTS_FILE}; save or download the adapter again.")
        return cls(folder, where, config, modules, whole)

    def texts(self, base: Mapping[str, Path], own: Mapping[str, Path]) -> dict[str, Path]:
        """The text files of the adapted model: its own before those of its base, but for config.json.

        Where the adapter has a tokenizer_config.json, the base's chat template does not count: it belongs to the other
        tokenizer_config.json.
        """
        own = {name: file for name, file in own.items() if name != "config.json"}
        inherited = {name: file for name, file in base.items() if not (name.startswith("chat_template") and "tokenizer_config.json" in own)}
        return inherited | own

    def report(self, base: SourceReport) -> SourceReport:
        """What stands in the report about the adapted model. `base`: what stands there about the base."""
        adapted = [module for module, parts in self.modules.items() if {"lora_A", "lora_embedding_A"} & parts.keys()]
        ranks = sorted({self.config.rank(module) for module in adapted})
        notes = [f"Its base has {base.bytes / 1e6:,.1f} MB of {', '.join(base.dtypes)}."]
        if ranks:
            kind = "DoRA" if self.config.use_dora else "LoRA"
            notes.append(f"{kind} of rank {', '.join(map(str, ranks))} on {len(adapted)} modules was merged while weights were read.")
        if self.whole:
            notes.append(f"{len(self.whole)} tensors of the adapter stand in place of the base's.")
        tensors = [*self.whole.values(), *(tensor for parts in self.modules.values() for tensor in parts.values())]
        return SourceReport.of("adapter", tensors, (*notes, *base.notes))

    def over(self, base: Mapping[str, StoredTensor], tied: bool) -> tuple[dict[str, StoredTensor], bool]:
        """The tensors of the adapted model, and whether its head is still tied to its embedding.

        `tied`: whether the base's is. Raises InputError where adapter and base do not belong together.
        """
        embedding, head = f"{EMBEDDING}.weight", f"{HEAD}.weight"
        tensors = dict(base)
        for name, tensor in self.whole.items():
            if name not in base and not (tied and name == head):
                raise InputError(f"{self.where} brings the tensor '{name}', which its base lacks: name the base that it was trained on.")
            if not self.config.saves(name.rpartition(".")[0]):
                tensors[name] = tensor
        if tied:  # a head of its own, until the end shows that nothing parts the two
            tensors[head] = tensors[embedding]
        for name, tensor in self.whole.items():
            if self.config.saves(name.rpartition(".")[0]):
                tensors[name] = tensor
        if tied and self.config.ensure_weight_tying and self.config.saves(EMBEDDING):
            tensors[head] = tensors[embedding]
        self._check_shapes(tensors, base)
        for module, parts in self.modules.items():
            self._adapt(tensors, module, parts)
        if tied and "token_adapter.trainable_tokens_delta" in self.modules.get(EMBEDDING, {}) and HEAD not in self.modules:
            tensors[head] = tensors[embedding]  # PEFT ties replaced rows too
        if tied and tensors[head] is tensors[embedding]:
            del tensors[head]
            return tensors, True
        return tensors, False

    def _check_shapes(self, tensors: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor]) -> None:
        """Whole tensors have their base's shape; embedding and head may have other rows, and then both have as many."""
        for name in self.whole:
            given, expected = tensors[name].shape, base[name if name in base else f"{EMBEDDING}.weight"].shape
            if given != expected and not (name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") and given[1:] == expected[1:]):
                raise InputError(
                    f"{self.where} has '{name}' of shape {list(given)}; its base has {list(expected)}: name the base that it was trained on."
                )
        rows = {name: tensors[name].shape[0] for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") if name in tensors}
        if len(set(rows.values())) > 1:
            raise InputError(
                f"{self.where} resizes {' and '.join(f'{name} to {count}' for name, count in rows.items())} rows; expected as many in both: "
                "save the adapter again with save_embedding_layers=True."
            )

    def _adapt(self, tensors: dict[str, StoredTensor], module: str, parts: Mapping[str, StoredTensor]) -> None:
        """Put one module's adapter over its tensors."""
        name, embeds = f"{module}.weight", "lora_embedding_A" in parts
        if name not in tensors:
            raise InputError(f"{self.where} adapts '{module}', which its base lacks: name the base that it was trained on.")
        tensor, rest = tensors[name], dict(parts)
        a, b = (rest.pop(f"lora_{'embedding_' if embeds else ''}{factor}", None) for factor in "AB")
        if (a is None) != (b is None):
            raise InputError(f"{self.where} has only one of the two factors of '{module}'; save or download the adapter again.")
        if a is not None and b is not None:
            if embeds:
                a, b = TransposedTensor(b), TransposedTensor(a)
            self._check_factors(module, a, b, tensor)
            tensor = LowRankTensor(tensor, a, b, self.config.scale(module))
        if (bias := rest.pop("lora_B.bias", None)) is not None:
            if f"{module}.bias" not in tensors:
                raise InputError(
                    f"{self.where} adds a bias to '{module}' (lora_bias), which has none in its base: train it without lora_bias."
                )
            self._check_length(module, "lora_B.bias", bias, tensor.shape[0])
            tensors[f"{module}.bias"] = AddedTensor(tensors[f"{module}.bias"], bias, self.config.scale(module))
        if (magnitude := rest.pop("lora_magnitude_vector", None)) is not None:
            self._check_length(module, "lora_magnitude_vector", magnitude, tensor.shape[1 if embeds else 0])
            tensor = ColumnNormTensor(tensor, magnitude) if embeds else RowNormTensor(tensor, magnitude)
        elif self.config.use_dora and a is not None:
            raise InputError(f"{self.where} sets use_dora but lacks the magnitudes of '{module}'; save or download the adapter again.")
        if (rows := rest.pop("token_adapter.trainable_tokens_delta", None)) is not None:
            ids = self.config.tokens(module)
            if rows.shape != (len(ids), *tensor.shape[1:]) or (ids and not 0 <= min(ids) <= max(ids) < tensor.shape[0]):
                raise InputError(
                    f"{self.where} has rows of shape {list(rows.shape)} for the {len(ids)} trainable_token_indices of '{module}' "
                    f"{list(tensor.shape)}: save or download the adapter again."
                )
            tensor = ReplacedRowsTensor(tensor, rows, ids)
        if rest:
            raise InputError(f"{self.where} has {sorted(rest)[0]} of '{module}' beside an embedding's factors: save the adapter again.")
        tensors[name] = tensor

    def _check_length(self, module: str, part: str, vector: StoredTensor, expected: int) -> None:
        """Raise InputError unless a vector has the length that the base needs."""
        if vector.shape != (expected,):
            raise InputError(
                f"{self.where} has the {part} of '{module}' in shape {list(vector.shape)}; its base needs [{expected}]: "
                "name the base that it was trained on."
            )

    def _check_factors(self, module: str, a: StoredTensor, b: StoredTensor, tensor: StoredTensor) -> None:
        """Raise InputError unless B·A has the base's shape and the config's rank."""
        rank = self.config.rank(module)
        if len(tensor.shape) != 2 or a.shape != (rank, tensor.shape[1]) or b.shape != (tensor.shape[0], rank):
            raise InputError(
                f"{self.where} has factors of shapes {list(b.shape)} and {list(a.shape)} for '{module}'; rank {rank} of its {CONFIG_FILE} and "
                f"its base's {list(tensor.shape)} need {[tensor.shape[0], rank]} and {[rank, *tensor.shape[1:]]}: name the base that it was trained on."
            )
