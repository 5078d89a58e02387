"""Which packages are here, in which release."""

from importlib.metadata import PackageNotFoundError, version


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
