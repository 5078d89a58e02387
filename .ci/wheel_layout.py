"""How the checkout's folders lie in a wheel: all below the package `fusionroute`.

See docs/decisions/0001-one-import-spelling.md. Hatch's own settings cannot say this: `sources` refuses editable
installs when it moves a folder down, and `force-include` would copy the folders into editable installs, where they must
be the checkout's own.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("runtime", "calibration", "fr_export")
FILES = {
    "fusionroute.py": "fusionroute/__init__.py",
    "fr_export/commands/__main__.py": "fusionroute/__main__.py",  # python -m fusionroute
    "runtime/py.typed": "fusionroute/py.typed",
}


class WheelLayout(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the folders where the package's name says, in wheels that are no editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatch before it writes a wheel; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"] |= FILES | {folder: f"fusionroute/{folder}" for folder in FOLDERS}
