"""Find a checkpoint: a local folder, or a download of safetensors and text files from the Hugging Face hub."""

import errno
import re
from pathlib import Path

from fusionroute.runtime.errors import InputError, UnavailableError, one_line

# errors of the cache folder, not of the network
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}

PATTERNS = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "fusion.json", "tokenizer*",
    "special_tokens_map.json", "chat_template*", "adapter_config.json",
]  # fmt: skip
# Weights in subfolders are other models. Their adapter_config.json says what there is.
ELSEWHERE = ["*/*.safetensors", "*/*.safetensors.index.json"]


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a path, or a hub id that is downloaded into the hub's cache.

    `owner/name/folder` is a folder of a hub repository. `revision` is a branch, tag or commit there.

    Raises InputError for a folder that does not exist, UnavailableError where the hub cannot be reached or refuses.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder.resolve()
    if source and folder.exists():
        raise InputError(f"{source} is a file; expected a checkpoint folder or a hub id such as owner/name.")
    parts = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not parts or source.startswith(".") or (parts[2] and Path(source.partition("/")[0]).is_dir()):
        raise InputError(f"The checkpoint folder {source} does not exist (and is no hub id such as owner/name).")
    return download(parts[1], parts[2], revision)


def download(hub_id: str, subfolder: str | None = None, revision: str | None = None) -> Path:
    """Fetch the safetensors, config and tokenizer of a hub repository, or of one of its folders."""
    from huggingface_hub import snapshot_download
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
        allowed = [f"{subfolder}/{name}" for name in PATTERNS] if subfolder else [*PATTERNS, "*/adapter_config.json"]
        ignored = [f"{subfolder}/{name}" for name in ELSEWHERE] if subfolder else ELSEWHERE
        snapshot = Path(snapshot_download(hub_id, allow_patterns=allowed, ignore_patterns=ignored, revision=revision))
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
    folder = snapshot / (subfolder or "")
    if not folder.is_dir():
        raise InputError(f"The hub's {hub_id} has no folder {subfolder} with a checkpoint: name one that it has, or the repository itself.")
    return folder
