"""Find a checkpoint: a local folder or GGUF file, or a download of weights and text files from the Hugging Face hub."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from fusionroute.fr_export.checkpoints.gguf_names import models_among, of_kind, parts_of
from fusionroute.fr_export.checkpoints.pickled import PICKLES, conversion
from fusionroute.runtime.errors import InputError, UnavailableError, one_line

# errors of the cache folder, not of the network
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}

PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "fusion.json", "tokenizer*", "*.model", "vocab.json", "merges.txt", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja", "processor_config.json",
    "adapter_config.json",
]  # fmt: skip
# Weights in subfolders are other models. Their adapter_config.json says what there is.
ELSEWHERE = ["*/*.safetensors", "*/*.safetensors.index.json"]


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, or its GGUF file: a path, or a hub id that is downloaded into the hub's cache.

    `owner/name/folder` is a folder of a hub repository, `owner/name:file.gguf` or `owner/name:Q4_K_M` one of its GGUF
    models. `revision` is a branch, tag or commit there.

    Raises InputError for a folder that does not exist, UnavailableError where the hub cannot be reached or refuses.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder.resolve()
    if folder.is_file() and folder.suffix == ".gguf":
        return folder.absolute()  # a link keeps its name, which tells the parts of a split file
    if source and folder.exists():
        raise InputError(f"{source} is a file; expected a checkpoint folder, a GGUF file or a hub id such as owner/name.")
    parts = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+)|:([\w./-]+))?", source)
    if not parts or source.startswith(".") or (parts[2] and Path(source.partition("/")[0]).is_dir()):
        raise InputError(f"The checkpoint folder {source} does not exist (and is no hub id such as owner/name).")
    if parts[3]:
        return download_gguf(parts[1], parts[3], revision)
    return download(parts[1], parts[2], revision)


def download(hub_id: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """Fetch the safetensors, config and tokenizer of a hub repository, or of one of its folders.

    A repository that has no safetensors but one GGUF model gives that one. Raises InputError where it has several, or
    pickled weights only.
    """
    allowed = [f"{subfolder}/{name}" for name in PATTERNS] if subfolder else [*PATTERNS, "*/adapter_config.json"]
    ignored = [f"{subfolder}/{name}" for name in ELSEWHERE] if subfolder else ELSEWHERE
    snapshot_folder = snapshot(hub_id, allowed, ignored, revision)
    folder = snapshot_folder / (subfolder or "")
    if not folder.is_dir():
        raise InputError(f"The hub's {hub_id} has no folder {subfolder} with a checkpoint: name one that it has, or the repository itself.")
    if subfolder or any(folder.glob("model*.safetensors*")) or any(snapshot_folder.rglob("adapter_config.json")):
        return folder
    names = listed(hub_id, revision)
    models = models_among(names)
    if len(models) > 1:
        raise InputError(
            f"The hub's {hub_id} holds {len(models)} GGUF models ({', '.join(map(str, models))}): name one, such as {hub_id}:{models[0]}."
        )
    if models:
        return download_gguf(hub_id, str(models[0]), revision)
    if pickled := [name for name in names if name.suffix in PICKLES]:
        local = Path(hub_id).name
        raise InputError(
            f"The hub's {hub_id} holds pickled weights ({pickled[0]}) only; download it (hf download {hub_id} --local-dir {local}) and "
            f"{conversion(local)}"
        )
    return folder


def download_gguf(hub_id: str, name: str, revision: str | None = None) -> Path:
    """Fetch a GGUF model of a hub repository: the file `name`, or the one of a kind of quantisation such as Q4_K_M.

    Raises InputError where there is none, or several.
    """
    path = PurePosixPath(name)
    if path.suffix == ".gguf":
        folder = snapshot(hub_id, [*map(str, parts_of(path)), *PATTERNS], ["*.safetensors"], revision)
        models = [folder / path] if (folder / path).is_file() else []
    else:
        spellings = dict.fromkeys((name, name.upper(), name.lower()))
        endings = [f"*{spelling}{end}" for spelling in spellings for end in (".gguf", "-*-of-*.gguf")]
        folder = snapshot(hub_id, [*endings, *PATTERNS], ["*.safetensors"], revision)
        models = [file for file in models_among(folder.rglob("*.gguf")) if of_kind(file, name)]
    if len(models) != 1:
        have = [str(file.relative_to(folder)) for file in models] or [str(file) for file in models_among(listed(hub_id, revision))]
        raise InputError(
            f"The hub's {hub_id} has {len(models) or 'no'} GGUF models '{name}'; name one of its files ({', '.join(have) or 'it has none'})."
        )
    return models[0]


def listed(hub_id: str, revision: str | None) -> list[PurePosixPath]:
    """The files of a hub repository; none where the hub cannot be reached."""
    from huggingface_hub import HfApi

    with suppress(Exception):  # what was downloaded before will do
        return [PurePosixPath(name) for name in HfApi().list_repo_files(hub_id, revision=revision)]
    return []


def snapshot(hub_id: str, allowed: Sequence[str], ignored: Sequence[str], revision: str | None) -> Path:
    """The folder of a hub repository in the hub's cache, with the files that patterns allow."""
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=list(allowed), ignore_patterns=list(ignored), revision=revision))


@contextmanager
def hub_errors(hub_id: str) -> Iterator[None]:
    """Say what the hub's errors mean, in one sentence each."""
    from huggingface_hub.errors import (  # fmt: skip
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    unreachable = f"There is no folder {hub_id}, and the hub cannot be reached to download it: go online once, or name a local folder."

    try:
        yield
    except GatedRepoError as error:
        raise UnavailableError(
            f"{hub_id} is gated: accept its licence on the hub and log in (hf auth login), or name a local folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnavailableError(
            f"There is no folder {hub_id}, and the hub knows no such repository (or it is private: hf auth login)."
        ) from error
    except HFValidationError as error:
        raise InputError(f"There is no folder {hub_id}, and it is no hub id such as owner/name ({one_line(error)}).") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise UnavailableError(unreachable) from error
    except Exception as error:  # the hub's HTTP client has changed its own exception types between versions
        network = isinstance(error, OSError) and error.errno not in DISK
        if not network and "http" not in type(error).__module__:
            raise
        raise UnavailableError(unreachable) from error
