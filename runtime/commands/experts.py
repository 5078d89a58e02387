"""`fusionroute add-expert` and `fusionroute remove-expert`: the experts of a bundle whose models share one base."""

from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime.adapters import expert_files
from fusionroute.runtime.commands.options import BundleFolder, Debug, VerifyKey
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.terminal import Terminal


def add_expert(
    bundle: BundleFolder,
    expert: Annotated[str, typer.Argument(metavar="NAME=SRC", help="A row of the routing head, and the folder of a LoRA adapter.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an expert of that name.")] = False,
    verify_key: VerifyKey = None,
    debug: Debug = False,
) -> None:
    """Add a LoRA adapter of the bundle's base as an expert. The base is not touched. Needs no torch.

    The bundle loses its signature, since its manifest is another then.
    """
    name, equals, source = expert.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter(f"'{expert}' is not of the form NAME=SRC", param_hint="NAME=SRC")
    show(bundle, expert_files.add_expert(bundle, name, Path(source).expanduser(), force, verify_key))


def remove_expert(
    bundle: BundleFolder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The expert to remove.")],
    verify_key: VerifyKey = None,
    debug: Debug = False,
) -> None:
    """Remove an expert from a bundle whose models share one base. It can be added again in its row of the routing head.

    The bundle loses its signature, since its manifest is another then.
    """
    show(bundle, expert_files.remove_expert(bundle, name, verify_key))


def show(bundle: Path, manifest: Manifest) -> None:
    """Print one line: who the experts are now, and what they take."""
    size = sum(manifest.files[path].bytes for path in expert_paths(manifest))
    vacant = [row for row in manifest.rows if row not in manifest.experts]
    rest = f"; rows without an expert: {', '.join(vacant)}" if vacant else ""
    Terminal().print(f"{bundle}: experts {', '.join(manifest.experts)}, {size / 1e6:,.1f} MB{rest}", soft_wrap=True)


def expert_paths(manifest: Manifest) -> set[str]:
    """The files with factors of experts."""
    return {path for pair in expert_files.pairs(manifest) for path in pair.factors.values()}
