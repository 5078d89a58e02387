"""The weights of a bundle are finite: a NaN in a scale or a norm would be in every answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.errors import BundleError, one_line
from fusionroute.runtime.graph_tensors import WIDTHS, tensors
from fusionroute.runtime.tensor_file import TensorFile

PIECE = 1 << 22  # values that are looked at together
EXPONENTS = {1: (np.uint32, 0x7F800000), 10: (np.uint16, 0x7C00), 16: (np.uint16, 0x7F80)}  # by ONNX's type: bits and all ones
ONNX_TYPES = {"F32": 1, "F16": 10, "BF16": 16}


def check_finite(bundle: Bundle) -> None:
    """Look at every float in graphs, weight files and factors.

    Raises BundleError for a NaN, and for an infinity in more than a single number: those stand for masked scores.
    """
    pairs = [variant.pair for variant in bundle.manifest.variants if variant.pair is not None]
    factors = {name for pair in pairs for name in pair.files if name.endswith(".safetensors")}
    graphs = {name for name in bundle.manifest.files if name.endswith(".onnx")}
    for name in sorted(factors | graphs):
        path = bundle.folder / name
        try:
            wrong = next(of_graph(bundle, name) if name in graphs else of_factors(bundle, name), None)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({one_line(error)}); copy or export the bundle again.") from error
        if wrong is not None:
            raise BundleError(f"The tensor '{wrong}' of {path} holds NaN or infinity; export the bundle again.")


def of_graph(bundle: Bundle, name: str) -> Iterator[str]:
    """The tensors of a graph that are not finite."""
    for each in tensors(bundle.read(name)):
        if each.type not in WIDTHS or not each.bytes:
            continue
        if each.data is not None:
            values = np.frombuffer(each.data, np.uint8)
        elif each.location:
            weights = str(PurePosixPath(name).parent / each.location)
            if weights not in bundle.manifest.files:
                raise ValueError(f"it reads {weights!r}, which the manifest does not name")
            with bundle.open_file(weights) as file:
                values = np.memmap(file, np.uint8, "r", each.offset, (each.bytes,))
        else:
            continue
        if not finite(values, each.type):
            yield each.name


def of_factors(bundle: Bundle, name: str) -> Iterator[str]:
    """The tensors of a safetensors file that are not finite."""
    with bundle.open_file(name) as file:
        tensors = TensorFile(file).tensors
    return (tensor for tensor, each in tensors.items() if not finite(each.data, ONNX_TYPES[each.dtype]))


def finite(data: np.ndarray, kind: int) -> bool:
    """Whether bytes hold finite values of ONNX's type; a single value may be infinite."""
    bits, ones = EXPONENTS[kind]
    values = data.view(bits)
    if len(values) == 1:
        return not bool(values[0] & ones == ones and values[0] & (ones & -ones) - 1)
    return all(((values[start : start + PIECE] & ones) != ones).all() for start in range(0, len(values), PIECE))
