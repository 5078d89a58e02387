"""Which ONNX operators which TensorRT has: the table that graphs are held against, and what a builder's own parser says."""

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
    """operators.json: version → the operators that it has beyond those of the version before, and sources."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def known(version: str) -> set[str]:
    """The operators of a TensorRT version such as "10.3": those of the last listed one that is no newer."""
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
    """Refuse a graph before it is built. Raises UnavailableError naming the first operator that the parser does not import."""
    for operator in sorted(operators):
        if not parser.supports_operator(operator):
            newer = since(operator)
            raise UnavailableError(
                f"{NAMES[flavour]} {version} does not import the operator {operator}"
                f"{f', which TensorRT has from {newer} on' if newer else ''}: install a newer one, or run the bundle on another device."
            )
