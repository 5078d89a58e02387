"""`fusionroute push` and `fusionroute pull`: a bundle to and from the Hugging Face hub. Neither needs torch."""

import json
import re
import sys
from typing import Annotated

import typer
from huggingface_hub.utils import disable_progress_bars

from fusionroute.fr_export.hub import pull as pulling
from fusionroute.fr_export.hub import push as pushing
from fusionroute.fr_export.hub.model_card import model_card
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, NewFolder, VerifyKey
from fusionroute.runtime.terminal import Terminal

REPORT = "report.json"


def parse_repository(name: str) -> str:
    """A hub id, `owner/name`."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise typer.BadParameter(f"'{name}' is no hub id such as owner/name")
    return name


def parse_base(name: str) -> str:
    """A hub id of --base-model."""
    return parse_repository(name)


def parse_licence(name: str) -> str:
    """A licence as the hub spells it, such as apache-2.0."""
    if not re.fullmatch(r"[\w.+-]+", name):
        raise typer.BadParameter(f"'{name}' is no licence as the hub spells it, such as apache-2.0")
    return name


Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", parser=parse_repository, help="Repository on the hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, or for pull also a tag or commit; default: main.")]


def push(
    bundle: BundleFolder,
    repository: Repository,
    licence: Annotated[
        str | None,
        typer.Option("--license", parser=parse_licence, metavar="ID", help="The licence as the hub spells it, such as apache-2.0."),
    ] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(parser=parse_base, metavar="OWNER/NAME", help="Repeat per model that the bundle was made from.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Revision = None,
    verify_key: VerifyKey = None,
    debug: Debug = False,
) -> None:
    """Push a bundle to the hub in one commit, with its signature and a model card made from its report."""
    quiet_unless_watched()
    opened = Bundle.open(bundle, verify_key)
    report = json.loads(opened.text(REPORT) or "{}")
    card = model_card(opened.manifest, report, repository, licence, base_model or ())
    Terminal().print(pushing.push(opened, repository, card, private, revision), soft_wrap=True)


def pull(repository: Repository, folder: NewFolder, revision: Revision = None, verify_key: VerifyKey = None, debug: Debug = False) -> None:
    """Pull a bundle from the hub into a new folder, which appears when it is complete and every hash is right."""
    quiet_unless_watched()
    manifest = pulling.pull(repository, folder, revision, verify_key)
    Terminal().print(f"{folder}: {len(manifest.files)} files, all with the hashes of the manifest", soft_wrap=True)


def quiet_unless_watched() -> None:
    """No progress bars where nobody sees them."""
    if not sys.stderr.isatty():
        disable_progress_bars()
