"""The runtime's public face: `from fusionroute import FusionRuntime`.

In a checkout this file makes one package of the folders beside it; in a wheel it is that package's `__init__.py`, and
the folders lie below it. So `fusionroute.runtime` is spelled alike in both, and an app may have a package `runtime` of
its own. See docs/decisions.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]

from fusionroute.runtime import (
    BundleError,
    BusyError,
    ClosedError,
    FusionError,
    FusionRuntime,
    Grammar,
    InputError,
    NumericalError,
    Result,
    Sampling,
    Scores,
    Session,
    Stream,
    Token,
    UnavailableError,
    __version__,
)

__all__ = [
    "BundleError",
    "BusyError",
    "ClosedError",
    "FusionError",
    "FusionRuntime",
    "Grammar",
    "InputError",
    "NumericalError",
    "Result",
    "Sampling",
    "Scores",
    "Session",
    "Stream",
    "Token",
    "UnavailableError",
    "__version__",
]

if __name__ == "__main__":  # `python -m fusionroute` in a checkout; in a wheel there is a __main__.py
    from fusionroute.fr_export.commands.main import main

    main()
