"""Push a bundle to a repository of the hub, in one commit: nobody can pull half of it.

Contents that the hub has already are not sent again, so a push that was interrupted goes on where it stopped.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from fusionroute.fr_export.hub.errors import LOG_IN, explained
from fusionroute.fr_export.hub.model_card import CARD, MARK
from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import InputError, UnavailableError
from fusionroute.runtime.manifest_file import NAME, SIGNATURE, read_signature

OTHERS = {".gitattributes", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"}  # what a repository may hold before the first push


def push(bundle: Bundle, repository: str, card: str, private: bool = False, revision: str | None = None) -> str:
    """Push a bundle with its model card to `owner/name`, which is created where it does not exist. Returns its address.

    The repository may hold an older bundle, whose files are replaced, but no other model. A README.md that was edited
    by hand (without the line MARK) stays. Raises InputError for a repository of something else, UnavailableError where
    the hub cannot be reached or refuses, BundleError for a bundle that was changed.
    """
    api = HfApi()
    with explained(repository, revision):
        if get_token() is None:
            raise UnavailableError(f"To push, the hub must know who you are: {LOG_IN}.")
        existing = files_of(api, repository, revision)
        if existing - OTHERS and NAME not in existing:
            raise InputError(f"{repository} holds {min(existing - OTHERS)} and is no bundle: name another repository.")
        bundle.verify()
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        names = [*bundle.manifest.files, NAME]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(bundle.folder / name)) for name in names
        ]
        if (signature := read_signature(bundle.folder)) is not None:
            names.append(SIGNATURE)
            operations.append(CommitOperationAdd(path_in_repo=SIGNATURE, path_or_fileobj=signature))
        if CARD not in existing or MARK in text(api, repository, CARD, revision):
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
        stale = (replaced(api, repository, revision, existing) | {SIGNATURE}) - {*names, *OTHERS}
        operations += [CommitOperationDelete(path_in_repo=name) for name in sorted(stale & existing)]
        commit = api.create_commit(repository, operations, commit_message=f"A bundle of {bundle.manifest.family}", revision=revision)
    return str(commit.commit_url)


def files_of(api: HfApi, repository: str, revision: str | None) -> set[str]:
    """The files of a repository; none where it, or its branch, does not exist yet."""
    try:
        return {sibling.rfilename for sibling in api.model_info(repository, revision=revision).siblings or ()}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set()


def text(api: HfApi, repository: str, name: str, revision: str | None) -> str:
    """A text file of a repository."""
    with TemporaryDirectory() as folder:
        return Path(api.hf_hub_download(repository, name, revision=revision, local_dir=folder)).read_text(encoding="utf-8")


def replaced(api: HfApi, repository: str, revision: str | None, existing: set[str]) -> set[str]:
    """The files that the repository's older bundle names, of any format."""
    if NAME not in existing:
        return set()
    try:
        return set(json.loads(text(api, repository, NAME, revision))["files"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"The {NAME} in {repository} is not a bundle's: name another repository.") from None
