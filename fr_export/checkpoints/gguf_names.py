"""How GGUF files are named: which of them are models, and which are parts of one."""

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import TypeVar

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
PROJECTOR = "mmproj"  # begins the names of files that hold a model's eyes, not its text model

Name = TypeVar("Name", bound=PurePath)


def models_among(files: Iterable[Name]) -> list[Name]:
    """The GGUF models among files, in order of their names. Of a split one it is the first part."""
    return [
        file
        for file in sorted(files)
        if file.suffix == ".gguf"
        and not file.name.startswith(PROJECTOR)
        and ((part := PART.fullmatch(file.name)) is None or int(part["number"]) == 1)
    ]


def parts_of(file: Name) -> tuple[Name, ...]:
    """The names of all parts of a split GGUF, of which `file` is any; itself where it is not split."""
    part = PART.fullmatch(file.name)
    if part is None:
        return (file,)
    count = int(part["count"])
    return tuple(file.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def of_kind(file: PurePath, kind: str) -> bool:
    """Whether a file's name ends with a kind of quantisation, such as Q4_K_M."""
    part = PART.fullmatch(file.name)
    stem = part["stem"] if part else file.stem
    return re.fullmatch(rf"(?:.*[-._])?{re.escape(kind)}", stem, re.IGNORECASE) is not None
