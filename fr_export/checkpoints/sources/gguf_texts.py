"""The text files that a GGUF does not have, written from what it says: config, tokenizer, end tokens, chat template.

A file beside the GGUF takes precedence: it comes from the model itself, so it is exact.
"""

import json
from collections.abc import Callable
from pathlib import Path

from fusionroute.fr_export.checkpoints.converted_texts import converted_folder
from fusionroute.fr_export.checkpoints.sources.gguf_config import config_of, generation_of
from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile
from fusionroute.fr_export.checkpoints.sources.gguf_tokenizer import tokenizer_of
from fusionroute.runtime import files


def texts_of(where: str, gguf_file: GgufFile) -> dict[str, Path]:
    """The texts by name: those beside the GGUF, and converted ones, which the cache keeps.

    Raises InputError where a text cannot be made.
    """
    beside = gguf_file.files[0].parent
    texts = {name: beside / name for name in BESIDE if (beside / name).is_file()}
    folder = converted_folder(gguf_file.files)
    for name, convert in CONVERTED.items():
        if name in texts:
            continue
        file = folder / name
        if not file.is_file() and (text := convert(where, gguf_file)) is not None:
            files.replace(file, text.encode())
        if file.is_file():
            texts[name] = file
    return texts


def config_text(where: str, gguf_file: GgufFile) -> str:
    """config.json."""
    return json.dumps(config_of(where, gguf_file), indent=1)


def generation_text(_: str, gguf_file: GgufFile) -> str:
    """generation_config.json."""
    return json.dumps(generation_of(gguf_file), indent=1)


def tokenizer_text(where: str, gguf_file: GgufFile) -> str | None:
    """tokenizer.json."""
    tokenizer = tokenizer_of(where, gguf_file)
    return None if tokenizer is None else str(tokenizer.to_str())


def tokenizer_config_text(_: str, gguf_file: GgufFile) -> str | None:
    """tokenizer_config.json: the names of special tokens, for transformers."""
    tokens = gguf_file.get("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{short}_token": gguf_file.get(f"tokenizer.ggml.{key}_token_id") for short, key in names.items()}
    special = {name: tokens[index] for name, index in ids.items() if index is not None}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | special, indent=1, ensure_ascii=False)


def chat_template_text(_: str, gguf_file: GgufFile) -> str | None:
    """chat_template.jinja."""
    template: str | None = gguf_file.get("tokenizer.chat_template")
    return template


CONVERTED: dict[str, Callable[[str, GgufFile], str | None]] = {
    "config.json": config_text,
    "generation_config.json": generation_text,
    "tokenizer.json": tokenizer_text,
    "tokenizer_config.json": tokenizer_config_text,
    "chat_template.jinja": chat_template_text,
}
BESIDE = (*CONVERTED, "fusion.json", "special_tokens_map.json")
