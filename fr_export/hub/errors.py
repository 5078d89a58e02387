"""What goes wrong with a hub, in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fusionroute.runtime.errors import InputError, UnavailableError, one_line

UNREACHABLE = "The hub cannot be reached: check the network, and HF_ENDPOINT if you have set it."
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn the hub's errors about a repository into InputError and UnavailableError."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"'{repository}' is no hub id such as owner/name ({one_line(error)}).") from error
    except GatedRepoError as error:
        raise UnavailableError(f"{repository} is gated: accept its conditions on the hub, then {LOG_IN}.") from error
    except RevisionNotFoundError as error:
        raise UnavailableError(f"{repository} has no revision '{revision}': name one of its branches, tags or commits.") from error
    except RepositoryNotFoundError as error:
        raise UnavailableError(f"The hub has no repository {repository}, or it is private: check the name, or {LOG_IN}.") from error
    except LocalTokenNotFoundError as error:
        raise UnavailableError(f"The hub must know who you are: {LOG_IN}.") from error
    except OfflineModeIsEnabled as error:
        raise UnavailableError("HF_HUB_OFFLINE is set, so the hub is not asked: unset it.") from error
    except HfHubHTTPError as error:
        raise UnavailableError(refusal(repository, error)) from error
    except (LocalEntryNotFoundError, FileMetadataError) as error:
        answer = error.__cause__
        raise UnavailableError(refusal(repository, answer) if isinstance(answer, HfHubHTTPError) else UNREACHABLE) from error
    except Exception as error:
        if not of_the_network(error):
            raise
        raise UnavailableError(UNREACHABLE) from error


def of_the_network(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is one of the hub's HTTP client: releases use httpx or requests."""
    while error is not None:
        if type(error).__module__.partition(".")[0].startswith(("http", "requests")):
            return True
        error = error.__cause__
    return False


def refusal(repository: str, error: HfHubHTTPError) -> str:
    """The sentence for an answer that is an error."""
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return f"The hub does not know your token: {LOG_IN}."
    if status == 403:
        return f"Your token gives no right to do this with {repository}: make one that may write to it."
    return f"The hub refuses {repository} ({one_line(error)}): try again later."
