"""tokenizer.json from files of older tokenizers, such as a sentencepiece tokenizer.model, by transformers."""

from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from fusionroute.fr_export.checkpoints.converted_texts import converted_folder
from fusionroute.fr_export.console.quiet import quiet
from fusionroute.runtime import files
from fusionroute.runtime.errors import InputError, UnavailableError, one_line

OLDER = ("tokenizer.model", "spiece.model", "tiktoken.model", "tekken.json", "vocab.json")  # what a tokenizer.json is made of
NAMES = (*OLDER, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


def converted_tokenizer(where: str, folder: Path, older: str) -> Path:
    """The tokenizer.json of a folder that has only an older tokenizer; it is kept in the cache. older: its file.

    Raises UnavailableError where a package is missing, InputError for a tokenizer that transformers cannot convert.
    """
    sources = [folder / name for name in NAMES if (folder / name).is_file()]
    file = converted_folder(sources) / "tokenizer.json"
    if file.is_file():
        return file
    if older.endswith(".model") and not (is_sentencepiece_available() and is_protobuf_available()):
        raise UnavailableError(
            f"{where} has a {older} and no tokenizer.json, and converting it needs what the extra "
            "'sentencepiece' brings: pip install sentencepiece protobuf."
        )

    try:
        with quiet():
            text: str = AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer.to_str()
    except Exception as error:  # transformers raises many kinds
        raise InputError(
            f"{where} has a {older} that transformers cannot convert ({one_line(error)}): put a tokenizer.json beside it."
        ) from error
    files.replace(file, text.encode())
    return file
