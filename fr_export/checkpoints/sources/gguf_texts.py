"""The text files that a GGUF does not have, written from what it says: config, tokenizer, end tokens, chat template.

A file beside the GGUF takes precedence: it comes from the model itself, so it is exact.
"""

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fusionroute.fr_export.checkpoints.sources.gguf_config import config_of, generation_of
from fusionroute.fr_export.checkpoints.sources.gguf_file import GgufFile
from fusionroute.fr_export.checkpoints.sources.gguf_tokenizer import tokenizer_of
from fusionroute.runtime import files

VERSION = 1  # of the conversion: raising it lets every GGUF be converted again


def texts_of(where: str, gguf_file: GgufFile) -> tuple[Path, ...]:
    """The folders to look for a text in: the GGUF's own, then that of the converted texts, which the cache keeps.

    Raises InputError where a text is needed that cannot be made.
    """
    beside = gguf_file.files[0].parent
    folder = converted_folder(gguf_file)
    for name, convert in CONVERTED.items():
        if not (beside / name).is_file() and not (folder / name).is_file():
            text = convert(where, gguf_file)
            if text is not None:
                files.replace(folder / name, text.encode())
    return beside, folder


def converted_folder(gguf_file: GgufFile) -> Path:
    """`gguf/KEY` in the cache folder, where KEY tells path, size and time of the files; else a folder for this process."""
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in gguf_file.files]
    key = hashlib.sha256(json.dumps([VERSION, stamps]).encode()).hexdigest()
    folder = files.cache_folder() / "gguf" / key[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:  # the cache cannot be written
        folder = Path(tempfile.mkdtemp(prefix="fusionroute-gguf-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


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
