"""One causal LM on disk: its config, its lazily read weights, its tokenizer and, for a router, the routing head."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fr_export.families import FAMILIES, Family
from fr_export.hub import locate
from fr_export.weights import Weights
from runtime.errors import InputError

HEAD_FILE = "routing_head.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder after the checks that concern it alone. `where` names it in messages ("expert 'math' (folder)")."""

    name: str
    where: str
    folder: Path
    family: Family
    config: Any  # transformers' PretrainedConfig
    weights: Weights

    @classmethod
    def open(cls, name: str, source: str, family: Family, head_key: str | None = None) -> "Checkpoint":
        """Locate and check one checkpoint; `head_key` names the routing head where this is the router.

        Raises InputError for a folder that is missing, incomplete, or of another family.
        """
        folder = locate(source)
        where = f"{'The router' if head_key else f'Expert {name!r}'} ({folder})"
        raw = read_json(folder / "config.json", f"{where} is not a model folder")
        found = raw.get("model_type")
        if found != family.model_type:
            other = next((f.name for f in FAMILIES.values() if f.model_type == found), None)
            mend = f"use --family {other}" if other else f"supported families are {', '.join(FAMILIES)}"
            raise InputError(f"{where} is of model type '{found}'; family {family.name} expects '{family.model_type}': {mend}.")
        if raw.get("quantization_config"):
            raise InputError(f"{where} is already quantised; export from the fp32, fp16 or bf16 checkpoint it was made from.")
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds for an invalid config, all with a useful first line
            raise InputError(f"{where} has an invalid config.json: {str(error).splitlines()[0]}") from error
        family.check(where, config)
        checkpoint = cls(name, where, folder, family, config, Weights.open(folder, (HEAD_FILE,) if head_key else ()))
        checkpoint.check_shapes()
        return checkpoint

    def check_shapes(self) -> None:
        """The embedding and the head must have the shape that the config states, or the folder mixes two models."""
        expected = (self.config.vocab_size, self.config.hidden_size)
        for tensor in {"model.embed_tokens.weight", self.head_tensor}:
            if (shape := self.weights.shape(tensor)) != expected:
                raise InputError(
                    f"{self.where} has '{tensor}' of shape {list(shape)}; its config.json says {list(expected)}: they do not belong together."
                )

    @property
    def head_tensor(self) -> str:
        """Name of the LM head's weight: the embedding itself where the two are tied."""
        return "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

    @cached_property
    def tokenizer(self) -> dict[str, Any] | None:
        """tokenizer.json, or None where the folder has none (the bundle then accepts token ids only)."""
        file = self.folder / "tokenizer.json"
        return read_json(file, f"{self.where} has a broken tokenizer") if file.exists() else None

    @cached_property
    def vocabulary(self) -> dict[str, int] | None:
        """Token → id, added tokens included; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        vocab = self.tokenizer["model"]["vocab"]
        tokens = dict(vocab) if isinstance(vocab, dict) else {token: index for index, (token, _) in enumerate(vocab)}
        return tokens | {token["content"]: token["id"] for token in self.tokenizer.get("added_tokens", [])}

    @cached_property
    def special_tokens(self) -> dict[str, Any]:
        """Special added tokens (content → id) and the beginning-of-sequence id: what router and experts must agree on."""
        added = (self.tokenizer or {}).get("added_tokens", [])
        return {token["content"]: token["id"] for token in added if token.get("special")} | {"bos_token_id": self.config.bos_token_id}

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        file = self.folder / "generation_config.json"
        return read_json(file, f"{self.where} has a broken generation_config.json") if file.exists() else {}


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; InputError `what: …` where it is missing or broken."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: it holds no {file.name}.") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {file.name} cannot be read as JSON ({error}); write or download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: {file.name} must hold a JSON object.")
    return value
