"""Options for what a chat template is given beside the messages."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fusionroute.runtime.chat import ChatOptions
from fusionroute.runtime.chat_messages import plain_dicts
from fusionroute.runtime.errors import InputError, reason
from fusionroute.runtime.strict_json import check_json

ToolsFile = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE", help="A JSON list of functions for the chat template, each with its JSON schema.")
]
DocumentsFile = Annotated[
    Path | None, typer.Option("--documents", metavar="FILE", help='A JSON list of {"title", "text"} for the chat template.')
]


def read_lists(tools: Path | None, documents: Path | None) -> ChatOptions:
    """Those that are given. Raises InputError for a file that holds no list of dicts."""
    lists: ChatOptions = {}
    if tools is not None:
        lists["tools"] = read_list("tools", tools)
    if documents is not None:
        lists["documents"] = read_list("documents", documents)
    return lists


def read_list(name: str, file: Path) -> list[dict[str, Any]] | None:
    """The list of dicts in a JSON file. Raises InputError."""
    try:
        text = file.read_text(encoding="utf-8")
        check_json(text)
        return plain_dicts(name, json.loads(text))
    except (OSError, ValueError) as error:
        raise InputError(f"--{name} {file} holds no JSON list of dicts ({reason(error)}).") from error
