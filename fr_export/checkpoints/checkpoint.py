"""One causal LM on disk: config, tokenizer, lazily read weights and, for a router, the routing head."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fusionroute.fr_export.checkpoints.chat_template_files import chat_templates
from fusionroute.fr_export.checkpoints.config_file import family_of
from fusionroute.fr_export.checkpoints.hub import locate
from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.checkpoints.source_report import SourceReport
from fusionroute.fr_export.checkpoints.sources.adapter_base import locate_base
from fusionroute.fr_export.checkpoints.sources.lora import LoraAdapter
from fusionroute.fr_export.checkpoints.sources.merge_lora import merge
from fusionroute.fr_export.checkpoints.sources.model_folder import texts_in
from fusionroute.fr_export.checkpoints.sources.whole import open_source
from fusionroute.fr_export.checkpoints.tied_head import EMBEDDING, HEAD, NOTE, heads_apart
from fusionroute.fr_export.checkpoints.tokenizer_files import NAMING, TokenizerFiles, read_tokenizer
from fusionroute.fr_export.checkpoints.weights import Weights, tensors_of
from fusionroute.fr_export.console.quiet import quiet
from fusionroute.fr_export.families import Family
from fusionroute.runtime.adapters.lora_config import CONFIG_FILE, is_adapter
from fusionroute.runtime.chat import DEFAULT
from fusionroute.runtime.errors import InputError, one_line

HEAD_FILE = "routing_head.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has passed its own checks. `where` names it in messages: "Expert 'math' (folder)".

    `folder` is the one that was named. `texts` holds its other files by name: tokenizer.json, config.json, … `base` is the
    model under an adapter; None for a whole model.
    """

    name: str
    where: str
    folder: Path
    family: Family
    config: Any  # transformers' PretrainedConfig
    weights: Weights
    texts: Mapping[str, Path]
    source: SourceReport
    base: "Checkpoint | None" = None

    @classmethod
    def open(
        cls, name: str, source: str, family: Family | None = None, head_key: str | None = None, base: str | None = None
    ) -> "Checkpoint":
        """Locate and check one checkpoint; `head_key` names the routing head where this is the router.

        `family` is the one that it must be of; None takes the one that its config names. `base` is what an adapter is
        put over; None takes the one that it names. A whole model needs none.

        Raises InputError for a folder that is missing, incomplete or of another family, and for a router with a broken
        tokenizer or chat template.
        """
        folder = locate(source)
        where = f"{'The router' if head_key else f'Expert {name!r}'} ({folder})"
        extra = (HEAD_FILE,) if head_key else ()
        if is_adapter(folder, where, source):
            adapter = LoraAdapter.open(folder, where)
            start = locate_base(adapter.config, folder, where, base)
            try:
                whole = cls.open_whole(name, f"The base ({start}) of {where[0].lower()}{where[1:]}", start, family, ())
            except InputError as error:
                raise InputError(f"{str(error).rstrip('.')}, or name another base with --base.") from error
            checkpoint = whole.adapted(adapter, extra)
        else:
            checkpoint = cls.open_whole(name, where, folder, family, extra)
        if head_key:
            _ = checkpoint.end_tokens, checkpoint.chat_templates  # refused here if broken, not after an hour of writing
        return checkpoint

    @classmethod
    def open_whole(cls, name: str, where: str, path: Path, family: Family | None, extra: tuple[str, ...]) -> "Checkpoint":
        """Check a source with a whole model. `extra` safetensors of its folder are read too, where present. Raises like `open`."""
        source = open_source(where, path)
        model_type = read_json(source.texts["config.json"], f"{where} has no valid config").get("model_type")
        family = family_of(where, model_type, family)
        config, shapes = read_config(source.texts["config.json"].parent, where)
        family.check(where, config)
        tensors = source.tensors(config, shapes)
        report = source.report(tensors)
        if heads_apart(config, tensors):
            shapes, report = shapes | {HEAD: shapes[EMBEDDING]}, replace(report, notes=(*report.notes, NOTE))
        for file in extra:
            if (source.folder / file).is_file():
                beside = tensors_of(source.folder / file)
                tensors, report = tensors | beside, report.beside(beside.values())
        checkpoint = cls(name, where, source.folder, family, config, Weights(source.folder, tensors), source.texts, report)
        checkpoint.check_shapes(shapes)
        return checkpoint

    def adapted(self, adapter: LoraAdapter, extra: tuple[str, ...]) -> "Checkpoint":
        """This model under an adapter, whose folder's texts go before its own.

        `extra` safetensors of the adapter's folder are read too. Raises InputError where the two do not belong together.
        """
        tensors, tied = merge(adapter, self.weights.entries, self.config.tie_word_embeddings)
        for name in extra:
            if (file := adapter.folder / name).is_file():
                tensors |= tensors_of(file)
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings, config.vocab_size = tied, tensors["model.embed_tokens.weight"].shape[0]
        report = adapter.report(self.source)
        texts = adapter.texts(self.texts, texts_in(adapter.folder))
        weights = Weights(adapter.folder, tensors)
        return Checkpoint(self.name, adapter.where, adapter.folder, self.family, config, weights, texts, report, base=self)

    @property
    def files(self) -> set[Path]:
        """The files that its numbers depend on: those of the weights, and the configs."""
        return self.weights.files | {self.texts[name] for name in ("config.json", CONFIG_FILE) if name in self.texts}

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Every tensor must have the shape that the config states, or the folder mixes two models."""
        for tensor, expected in shapes.items():
            if (shape := self.weights.shape(tensor)) != expected:
                raise InputError(
                    f"{self.where} has '{tensor}' of shape {list(shape)}; its config.json says {list(expected)}: they do not belong together."
                )

    def file(self, name: str) -> Path | None:
        """A text file of the checkpoint, such as tokenizer.json, or None where it has none of that name."""
        return self.texts.get(name)

    @cached_property
    def tokenizer_files(self) -> TokenizerFiles | None:
        """Its tokenizer. None where there is none: the bundle then accepts token ids only. Raises InputError."""
        return read_tokenizer(self.where, self.texts, self.config.vocab_size)

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer as the runtime reads it, None without one."""
        return None if self.tokenizer_files is None else self.tokenizer_files.tokenizer

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by their names in chat templates, as the tokenizer's files have them.

        Where no file names any: the bos_token and eos_token whose ids config.json has.
        """
        if self.tokenizer_files is None:
            return {}
        if any(name in self.texts for name in NAMING):
            return self.tokenizer_files.named
        token_of = {id: token for token, id in (self.vocabulary or {}).items()}
        ids = {"bos_token": self.config.bos_token_id, "eos_token": next(iter(self.end_tokens), None)}
        return {name: token_of[id] for name, id in ids.items() if id in token_of}

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of it at an export, a sentence each without its end."""
        if self.tokenizer_files is None:
            return (*self.source.notes, "it has no tokenizer, so token ids are all that a bundle of it can read")
        beyond = ", ".join(self.tokenizer_files.beyond)
        more = [f"its files name the tokens {beyond}, which it does not embed: they are read as letters"] if beyond else []
        return (*self.source.notes, *more)

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, added tokens included; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> dict[str, Any]:
        """Special added tokens (content → id) and the id that begins a text: router and experts must agree on them."""
        added = self.tokenizer.get_added_tokens_decoder() if self.tokenizer is not None else {}
        return {token.content: index for index, token in added.items() if token.special} | {"bos_token_id": self.config.bos_token_id}

    @cached_property
    def end_tokens(self) -> list[int]:
        """All ids that end a text: those of config.json and, where it exists, of generation_config.json."""
        file = self.file("generation_config.json")
        generation = read_json(file, f"{self.where} has a broken generation_config.json") if file else {}
        ids: list[Any] = []
        for value in (self.config.eos_token_id, generation.get("eos_token_id")):
            ids += value if isinstance(value, list) else [value] if value is not None else []
        if wrong := [value for value in ids if not isinstance(value, int)]:
            raise InputError(
                f"{self.where} has the eos_token_id {wrong[0]!r} in {file.name if file else 'config.json'}; expected whole numbers: write it again."
            )
        return list(dict.fromkeys(ids))

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Its chat templates by name. Raises InputError for a broken one."""
        return chat_templates(self.where, self.texts)

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.chat_templates.get(DEFAULT)


def read_config(folder: Path, where: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """config.json as transformers reads it, of its language model where it has other parts, and the tensors that such a
    model has: name → shape.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder).get_text_config()
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what is read is dequantised
        if config.num_hidden_layers < 1 or config.num_attention_heads % config.num_key_value_heads:
            raise ValueError("expected at least one layer, and as many attention heads as key-value heads or a multiple of them")
        return config, shapes_of(empty_model(config))
    except Exception as error:  # transformers raises many kinds for an invalid config
        raise InputError(f"{where} has an invalid config.json ({one_line(error)}); mend it or download it again.") from error


def empty_model(config: Any) -> Any:
    """A transformers model of this config without values."""
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a transformers model reads from its checkpoint: name → shape."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
