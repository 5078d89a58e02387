"""Pages of HTML that load nothing: made of a template, written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.files import replace


def rendered(template: Path, **values: Any) -> str:
    """A Jinja template with its values, which are escaped."""
    from jinja2 import Template  # here: it takes a tenth of a second

    page: str = Template(template.read_text(encoding="utf-8"), autoescape=True).render(values)
    return page


def check_folder(path: Path) -> None:
    """Raise FusionError, before there is anything to write, where a file has no folder."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FusionError(f"{path} cannot be written, since {folder} is no folder: make it first.")


def write_page(page: str, path: Path) -> None:
    """Write a page, which appears when it is complete. Raises FusionError where it cannot be written."""
    try:
        replace(path, page.encode())
    except OSError as error:
        raise FusionError(
            f"The page cannot be written to {path} ({error.strerror}): name a file in a folder that you may write to."
        ) from error
