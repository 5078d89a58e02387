"""`fusionroute pack` and `fusionroute unpack`: a bundle in one file, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from fusionroute.runtime import archive
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, NewFolder, VerifyKey
from fusionroute.runtime.manifest_file import NAME
from fusionroute.runtime.terminal import Terminal

ArchiveFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file, such as gemma2.tar.")]


def pack(bundle: BundleFolder, file: ArchiveFile, verify_key: VerifyKey = None, debug: Debug = False) -> None:
    """Write a bundle, with its signature, into one file, a tar archive without compression. Every hash is checked on the way."""
    opened = Bundle.open(bundle, verify_key)
    size = (bundle / NAME).stat().st_size + sum(entry.bytes for entry in opened.manifest.files.values())
    with progress(f"packing {bundle.name}", size) as advance:
        archive.pack(opened, file, advance)
    Terminal().print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB", soft_wrap=True)


def unpack(file: ArchiveFile, folder: NewFolder, verify_key: VerifyKey = None, debug: Debug = False) -> None:
    """Write the bundle in a file into a new folder, which appears when it is complete and every hash is right."""
    with progress(f"unpacking {file.name}", None) as advance:
        manifest = archive.unpack(file, folder, advance, verify_key)
    Terminal().print(f"{folder}: {len(manifest.files)} files, all with the hashes of the manifest", soft_wrap=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[archive.Advance]:
    """A bar on stderr that counts bytes; yields the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = Terminal(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)
