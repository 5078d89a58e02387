"""The ONNX operators of each TensorRT version: a table to choose graphs by, and the check by a builder's own parser."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.tensorrt.library import NAMES

TABLE = Path(__file__).with_name("operators.json")


@functools.cache
def table() -> dict[str, Any]:
    """operators.json: for each version the operators that it added, and sources."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def known(version: str) -> set[str]:
    """The operators of a TensorRT version such as "10.3".

    Those of the newest version in the table that is not newer.
    """
    operators: set[str] = set()
    for listed, entry in table()["versions"].items():
        if number(listed) <= number(version):
            operators |= set(entry["operators"])
    return operators


def since(operator: str) -> str | None:
    """The first listed version that has an operator."""
    return next((version for version, entry in table()["versions"].items() if operator in entry["operators"]), None)


def number(version: str) -> tuple[int, ...]:
    """`10.15` → (10, 15)."""
    return tuple(int(part) for part in version.split(".")[:2])


def check(operators: Iterable[str], parser: Any, flavour: str, version: str) -> None:
    """Check a graph's operators before it is built.

    Raises UnavailableError for the first that the parser does not import.
    """
    for operator in sorted(operators):
        if not parser.supports_operator(operator):
            newer = since(operator)
            raise UnavailableError(
                f"{NAMES[flavour]} {version} does not import the operator {operator}"
                f"{f', which TensorRT has from {newer} on' if newer else ''}: install a newer one, or run the bundle on another device."
            )
