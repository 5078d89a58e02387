"""`manifest.json` in a bundle's folder, and the signature of its bytes beside it."""

from __future__ import annotations

import logging
from pathlib import Path

from fusionroute.runtime.errors import BundleError, reason
from fusionroute.runtime.files import bring_back, replace, replacing
from fusionroute.runtime.regular_files import read_regular

NAME, SIGNATURE = "manifest.json", "manifest.json.sig"
MOST_BYTES = 1 << 26  # of a manifest: SmolLM2's has a quarter of a megabyte
SIGNATURE_BYTES = 64
LOG = logging.getLogger("fusionroute")


def read_manifest(folder: Path) -> bytes:
    """The manifest of the bundle in a folder, which is text. Raises BundleError where there is none."""
    try:
        if not folder.exists():
            bring_back(folder)
        if not folder.is_dir():
            raise BundleError(f"There is no bundle at {folder}: expected the folder that export.py wrote.")
        content = read_regular(folder, NAME, MOST_BYTES)
        content.decode()
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle, since it holds no {NAME}: expected the folder that export.py wrote.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / NAME} cannot be read ({reason(error)}); copy or export the bundle again.") from error
    return content


def write_manifest(folder: Path, content: bytes) -> None:
    """Write a manifest in place of an older one, whose signature goes with it, with a line in the log. Raises OSError."""
    with replacing(folder / NAME) as partial:
        partial.write_bytes(content)
        signed = (folder / SIGNATURE).is_symlink() or (folder / SIGNATURE).exists()
        (folder / SIGNATURE).unlink(missing_ok=True)
    if signed:
        LOG.warning("%s is not signed any more, since its manifest is another now: sign it again with `fusionroute sign`.", folder)


def read_signature(folder: Path) -> bytes | None:
    """The signature of the bundle in a folder; None without one. Raises BundleError for links and what is longer than one."""
    try:
        return read_regular(folder, SIGNATURE, SIGNATURE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{folder / SIGNATURE} cannot be read ({reason(error)}); copy the bundle again.") from error


def write_signature(folder: Path, signature: bytes) -> None:
    """Write a signature in place of an older one. Raises OSError."""
    replace(folder / SIGNATURE, signature)
