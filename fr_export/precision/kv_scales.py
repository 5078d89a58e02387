"""The steps in which keys and values are stored, from what calibration saw of them."""

from collections.abc import Mapping

import numpy as np

from fusionroute.calibration.observers import Observer
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.runtime.errors import InputError


def caches(graph: Graph) -> dict[str, int]:
    """The caches of a graph, as it names them behind a pass → channels of each."""
    kv_heads, head_size = graph.cache
    return {f"present.{layer}.{kind}": kv_heads * head_size for layer in range(graph.layers) for kind in ("key", "value")}


def kv_scales(graph: Graph, observed: Mapping[str, Observer], bits: int) -> dict[str, np.ndarray]:
    """Cache → its step by channel, float32 [kv_heads, head_size]: the largest value that calibration saw is the largest
    integer. Raises InputError where it saw none.
    """
    scales = {}
    for name in caches(graph):
        if name not in observed or not observed[name].rows:
            raise InputError(
                "the calibration table has no ranges of keys and values: calibrate again, or leave out --kv or name fp32 there"
            )
        largest = observed[name].channel_absmax
        steps = largest / np.float32(2 ** (bits - 1) - 1)
        scales[name] = np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps).reshape(graph.cache)
    return scales
