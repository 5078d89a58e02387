"""Options for what texts take, and for texts that are read once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.html_page import check_folder

KvMemory = Annotated[
    int | None, typer.Option("--kv-memory", min=1, help="MiB of keys and values that all texts take at most; default: no bound.")
]
LoadText = Annotated[
    Path | None, typer.Option("--load", metavar="FILE", help="A text that was saved: prompts that begin as it does are read behind it.")
]
SaveText = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Let all experts read the prompt, and write what they keep of it, for --load.")
]


def check_save(file: Path | None) -> None:
    """Raise FusionError, before anything is loaded, where a text could not be saved."""
    if file is not None:
        check_folder(file)


def load_text(runtime: FusionRuntime, file: Path | None) -> None:
    """Keep a saved text for prompts that begin alike. Raises as `Session.load`."""
    if file is not None:
        with runtime.session() as session:
            session.load(file)


def save_text(runtime: FusionRuntime, ids: Sequence[int], expert: str | None, file: Path | None) -> None:
    """Let the router and all experts, or the one that answers, read a text, and save it. Raises as `Session.read` and `save`."""
    if file is not None:
        with runtime.session() as session:
            session.append(ids)
            session.read(None if expert is None else (expert,))
            session.save(file)
