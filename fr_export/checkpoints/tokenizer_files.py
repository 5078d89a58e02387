"""A checkpoint's tokenizer as transformers puts it together: tokenizer.json, and the tokens that other files name."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.fr_export.console.quiet import quiet
from fusionroute.runtime.errors import InputError, one_line

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
NAMING = (CONFIG, "special_tokens_map.json", "added_tokens.json")  # files that name tokens
KEPT = ("clean_up_tokenization_spaces", "model_input_names", "model_max_length", "padding_side", "truncation_side")
DEFAULTS = {"clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"]}


@dataclass(frozen=True)
class TokenizerFiles:
    """`content` is a tokenizer.json with all tokens, byte for byte the checkpoint's where no other file adds any.

    `config`: a tokenizer_config.json that transformers 4 and 5 read alike, with the special tokens by their names.
    `beyond`: tokens that other files name and the model does not embed; they are no tokens here.
    """

    content: bytes
    tokenizer: Any  # of the package tokenizers
    config: Mapping[str, Any]
    beyond: tuple[str, ...]

    @property
    def named(self) -> dict[str, str]:
        """Special tokens by their names in chat templates, such as eos_token."""
        return {name: value for name, value in self.config.items() if name.endswith("_token") and isinstance(value, str)}


def read_tokenizer(where: str, texts: Mapping[str, Path], vocab_size: int) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint that embeds so many tokens, None where it has none. Raises InputError for broken files."""
    if FILE not in texts:
        return None
    content = texts[FILE].read_bytes()
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except BaseException as error:  # tokenizers raises nothing more precise, and panics that are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"{where} has a broken tokenizer: {FILE} cannot be read ({one_line(error)}); write or download it again."
        ) from error
    if not tokenizer.get_vocab_size():
        raise InputError(f"{where} has a broken tokenizer: {FILE} holds no tokens; write or download it again.")
    naming = {name: read_json(texts[name], f"{where} has a broken tokenizer") for name in NAMING if name in texts}
    if not naming:
        return TokenizerFiles(content, tokenizer, config_of({}, {}, []), ())
    complete = by_transformers(where, content, naming)
    known, added = tokenizer.get_added_tokens_decoder(), complete.backend_tokenizer.get_added_tokens_decoder()
    beyond = {id: token.content for id, token in added.items() if id >= vocab_size and id not in known}
    if added != known:
        content = with_tokens(content, complete.backend_tokenizer, beyond)
        tokenizer = Tokenizer.from_str(content.decode())
    more = getattr(complete, "extra_special_tokens", None)
    if not isinstance(more, list):  # transformers 4, where such a dict has names of its own
        more = complete.additional_special_tokens
    config = config_of(naming.get(CONFIG, {}), complete.special_tokens_map, [str(token) for token in more])
    return TokenizerFiles(content, tokenizer, config, tuple(beyond.values()))


def by_transformers(where: str, content: bytes, naming: Mapping[str, Mapping[str, Any]]) -> Any:
    """The tokenizer that transformers makes of these files. Raises InputError where it cannot."""
    files = {name: dict(values) for name, values in naming.items()}
    config = files.setdefault(CONFIG, {})
    for code in ("auto_map", "chat_template", "processor_class"):  # nothing that would be loaded too
        config.pop(code, None)
    if isinstance(listed := config.get("extra_special_tokens"), list):  # as transformers 5 writes it, and 4 cannot read it
        config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *listed]
        del config["extra_special_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, FILE).write_bytes(content)
        for name, values in files.items():
            Path(folder, name).write_text(json.dumps(values), encoding="utf-8")
        try:
            with quiet():
                return PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds
            names = " or ".join(naming)
            raise InputError(
                f"{where} has a broken tokenizer: transformers cannot read {names} ({one_line(error)}); write or download it again."
            ) from error


def with_tokens(content: bytes, complete: Any, beyond: Mapping[int, str]) -> bytes:
    """A tokenizer.json with the added tokens of a tokenizer, but for those `beyond` the embedding."""
    added = [token for token in json.loads(complete.to_str())["added_tokens"] if token["id"] not in beyond]
    return json.dumps(json.loads(content) | {"added_tokens": added}, ensure_ascii=False, indent=1).encode()


def config_of(stored: Mapping[str, Any], named: Mapping[str, Any], more: list[str]) -> dict[str, Any]:
    """A tokenizer_config.json of what a checkpoint's own says. `more`: special tokens without a name."""
    settings = DEFAULTS | {name: stored[name] for name in KEPT if stored.get(name) is not None}
    tokens = {name: str(token) for name, token in named.items() if not isinstance(token, list)}
    listed = {"additional_special_tokens": more} if more else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast"} | settings | tokens | listed
