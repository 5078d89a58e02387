"""`fusionroute sign`: the signature of a bundle, and keys."""

from pathlib import Path
from typing import Annotated

import typer

from fusionroute.runtime import signing
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import Debug
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.manifest_file import SIGNATURE, read_manifest, write_signature
from fusionroute.runtime.terminal import Terminal


def sign(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="Folder of the bundle, as the exporter wrote it.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Your private key: Ed25519, in PEM.")] = None,
    new_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a new private key to FILE, and its public key to FILE.pub.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Sign a bundle: its manifest's bytes, which hold the hash of every other file. All hashes are checked before."""
    if (key is None) == (new_key is None):
        raise typer.BadParameter("name your private key with --key, or the file for a new one with --new-key", param_hint="--key")
    if key is not None and bundle is None:
        raise typer.BadParameter("name the bundle to sign", param_hint="BUNDLE")
    console = Terminal()
    if new_key is not None:
        public = signing.write_new_key(new_key.expanduser())
        console.print(f"{new_key}: your private key; keep it. {public}: the public key; give it to who loads your bundles.", soft_wrap=True)
    if bundle is not None:
        sign_bundle(bundle, key or new_key or Path())
        console.print(f"{bundle}: signed, in {SIGNATURE}", soft_wrap=True)


def sign_bundle(folder: Path, key: Path) -> None:
    """Sign the bundle in a folder. Raises InputError for what is no key, BundleError for a broken bundle, FusionError."""
    private, text = signing.private_key(key.expanduser()), read_manifest(folder)
    Bundle.open(folder).verify()
    if read_manifest(folder) != text:
        raise FusionError(f"The bundle {folder} was replaced meanwhile: sign it again.")
    try:
        write_signature(folder, signing.sign(text, private))
    except OSError as error:
        raise FusionError(f"The signature cannot be written to {folder} ({error.strerror}): sign a copy that you may write to.") from error
