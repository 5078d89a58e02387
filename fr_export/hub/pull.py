"""Pull a bundle from a repository of the hub: the manifest first, then what it names, then every hash is checked."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from fusionroute.fr_export.hub.errors import explained
from fusionroute.runtime import signing
from fusionroute.runtime.archive import check_absent, check_room
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError
from fusionroute.runtime.files import appearing
from fusionroute.runtime.manifest import Manifest
from fusionroute.runtime.manifest_file import NAME, SIGNATURE, read_signature

AT_ONCE = 4  # downloads
PRIVATE = ".cache"  # where the hub's client keeps its notes in a folder that it downloads to


def pull(repository: str, folder: Path, revision: str | None = None, verify_key: Path | None = None) -> Manifest:
    """Download the bundle of `owner/name` into a new folder, which appears when it is complete and every hash is right.

    `revision`: a branch, tag or commit; it is resolved once, so a push meanwhile mixes nothing. `verify_key`: the file
    of a public key, whose owner must have signed the manifest; no other file is downloaded before. Raises InputError
    where the folder exists, BundleError for a repository that holds no bundle or a damaged one, UnavailableError where
    the hub cannot be reached or refuses; as `signing.public_key` and `signing.check` do.
    """
    check_absent(folder)
    key = None if verify_key is None else signing.public_key(verify_key)
    with explained(repository, revision):
        api = HfApi()
        about = api.model_info(repository, revision=revision, files_metadata=True)
        if NAME not in {sibling.rfilename for sibling in about.siblings or ()}:
            raise BundleError(f"{repository} holds no {NAME}, so it is no bundle: name a repository that `fusionroute push` wrote.")
        with appearing(folder) as partial:
            with downloads(partial):
                text = Path(api.hf_hub_download(repository, NAME, revision=about.sha, local_dir=partial)).read_bytes()
                if SIGNATURE in {sibling.rfilename for sibling in about.siblings or ()}:
                    api.hf_hub_download(repository, SIGNATURE, revision=about.sha, local_dir=partial)
                if key is not None:
                    signing.check(text, read_signature(partial), key, repository)
                manifest = Manifest.parse(text, f"The manifest of {repository}")
                compare(repository, about, manifest)
                check_room(sum(entry.bytes for entry in manifest.files.values()), partial)

                def fetch(name: str) -> None:
                    api.hf_hub_download(repository, name, revision=about.sha, local_dir=partial)

                with ThreadPoolExecutor(AT_ONCE) as pool:
                    tasks = [pool.submit(fetch, name) for name in manifest.files]
                    try:
                        for task in tasks:
                            task.result()
                    finally:
                        pool.shutdown(cancel_futures=True)
            damaged(repository, partial)
    return manifest


def compare(repository: str, about: ModelInfo, manifest: Manifest) -> None:
    """Refuse, before anything large is downloaded, what the hub itself says is not the manifest's.

    Raises BundleError.
    """
    siblings = {sibling.rfilename: sibling for sibling in about.siblings or ()}
    for name, entry in manifest.files.items():
        sibling = siblings.get(name)
        if sibling is None:
            raise BundleError(f"{repository} lacks {name}, which its manifest names: push the bundle again.")
        if sibling.size not in (None, entry.bytes) or (sibling.lfs and sibling.lfs.sha256 != entry.sha256):
            raise BundleError(f"{name} in {repository} is not the file that the manifest describes: push the bundle again.")


@contextmanager
def downloads(folder: Path) -> Iterator[None]:
    """Remove the notes of the hub's client from a folder at the end."""
    try:
        yield
    finally:
        shutil.rmtree(folder / PRIVATE, ignore_errors=True)


def damaged(repository: str, folder: Path) -> None:
    """Raise BundleError unless every file that was downloaded has its size and hash."""
    try:
        Bundle.open(folder).verify()
    except BundleError as error:
        raise BundleError(f"What {repository} sent is not what its manifest describes; pull it again, or push the bundle again.") from error
