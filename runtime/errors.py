"""Errors that are raised on purpose: one sentence that names the thing, what was expected, and how to mend it."""


class FusionError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one sentence fit to show a user, also in a terminal."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BundleError(FusionError):
    """The bundle is missing, incomplete, of another version, or was changed after it was written."""


class UnavailableError(FusionError):
    """The bundle or this machine lacks what was asked for: a precision, a device, an optional package."""


class InputError(FusionError, ValueError):
    """An argument is out of its range: a prompt longer than the context, a negative temperature, unknown token ids."""


class ClosedError(FusionError):
    """The runtime was closed while, or before, it was used."""


class BusyError(FusionError):
    """A session or a stream was used by two threads at once, or by a callback of its own."""


class NumericalError(FusionError):
    """A model answered NaN or infinite numbers. `model`: its name; None where only those of two together are."""

    def __init__(self, message: str, model: str | None = None):
        super().__init__(message)
        self.model = model


def printable(text: str) -> str:
    """A text with what moves cursors, ends lines or turns the direction of writing spelled out, as \\x1b."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def reason(error: Exception) -> str:
    """Why something could not be read or written, on one line: without the path, which the sentence names."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing.

    A KeyError's message is only the key, so the type's name is put in front.
    """
    text = printable(" ".join(str(error).split()))
    return f"{type(error).__name__} {text}".rstrip() if isinstance(error, KeyError) or not text else text
