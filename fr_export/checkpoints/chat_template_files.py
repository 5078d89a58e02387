"""The chat templates of a checkpoint, from every place where transformers reads them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionroute.fr_export.checkpoints.json_file import read_json
from fusionroute.runtime.chat import DEFAULT, broken
from fusionroute.runtime.errors import InputError

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
JSON = ("tokenizer_config.json", "chat_template.json", "processor_config.json")  # older places, the first that has one


def chat_templates(where: str, texts: Mapping[str, Path]) -> dict[str, str]:
    """Name → template; files of their own come before entries of others. Empty where there is none.

    Raises InputError for one that is no text, or that Jinja cannot compile within the bounds of the runtime.
    """
    templates = dict(of_files(where, texts) or of_json(where, texts))
    for name, template in templates.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{where} has a chat template of the name {name!r}: give it one of letters, digits, '-' and '_'.")
        if (reason := broken(template)) is not None:
            raise InputError(f"{where} has a {name} chat template that cannot be compiled ({reason}): mend it, or remove it.")
    return templates


def of_files(where: str, texts: Mapping[str, Path]) -> dict[str, str]:
    """Those that are files."""
    names = {FILE: DEFAULT} | {name: Path(name).stem for name in sorted(texts) if name.startswith(f"{FOLDER}/")}
    return {name: text_of(where, texts[file]) for file, name in names.items() if file in texts}


def text_of(where: str, file: Path) -> str:
    """Raises InputError for a file that is no UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} has a {file.name} that is no UTF-8 text ({error}); write or download it again.") from error


def of_json(where: str, texts: Mapping[str, Path]) -> dict[str, str]:
    """Those that JSON files hold: one text, or several by name."""
    for file in JSON:
        if file not in texts:
            continue
        stored: Any = read_json(texts[file], f"{where} has a broken tokenizer").get("chat_template")
        if stored is None:
            continue
        try:
            named = {DEFAULT: stored} if isinstance(stored, str) else stored if isinstance(stored, dict) else dict(map(entry, stored))
        except (TypeError, KeyError):
            named = {DEFAULT: None}
        if not all(isinstance(text, str) for text in (*named, *named.values())):
            raise InputError(f"{where} has a broken tokenizer: the chat_template in {file} is no text; write it again.")
        return named
    return {}


def entry(value: Mapping[str, Any]) -> tuple[Any, Any]:
    """One of several templates: its name, and its text."""
    return value["name"], value["template"]
