"""`fusionroute cache`: what the cache folder holds; show it or clear it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fusionroute.runtime.cache import DAY, Entry, clear, entries
from fusionroute.runtime.commands.options import Debug, Json
from fusionroute.runtime.files import cache_folder
from fusionroute.runtime.tables import tables
from fusionroute.runtime.terminal import Terminal


def cache(
    kind: Annotated[str | None, typer.Argument(help="Only entries of this kind, such as costs or packed; default: all.")] = None,
    clear_entries: Annotated[bool, typer.Option("--clear", help="Remove them, except those that a running process uses.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show or clear the cache folder: packed weights, measured costs of speculation, and what exports keep there."""
    listed = clear(kind) if clear_entries else entries(kind)
    if as_json:
        rows = [
            {"kind": entry.kind, "path": str(entry.path), "bytes": entry.bytes, "last_used": entry.last_used, "in_use": entry.in_use}
            for entry in listed
        ]
        print(json.dumps({"folder": str(cache_folder()), "cleared": clear_entries, "entries": rows}), flush=True)
        return
    console = Terminal()
    total = sum(entry.bytes for entry in listed)
    if listed and not clear_entries:
        console.print(*kinds(console, listed))
    verb = "removed from" if clear_entries else "in"
    console.print(f"{len(listed)} entries, {total / 1e6:,.1f} MB {verb} {cache_folder()}", soft_wrap=True)


def kinds(console: Console, listed: Sequence[Entry]) -> list[Table]:
    """A row per kind."""
    now = time.time()
    rows = []
    for kind in dict.fromkeys(entry.kind for entry in listed):
        of_kind = [entry for entry in listed if entry.kind == kind]
        days = [(now - entry.last_used) / DAY for entry in of_kind]
        size = sum(entry.bytes for entry in of_kind)
        in_use = sum(entry.in_use for entry in of_kind)
        rows.append((kind, str(len(of_kind)), f"{size / 1e6:,.1f}", str(in_use), f"{min(days):.0f} days ago", f"{max(days):.0f} days"))
    return tables(console, "Cache", ("kind",), ("entries", "MB", "in use", "last used", "longest unused"), rows)
