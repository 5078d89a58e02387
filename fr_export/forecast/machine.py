"""How fast this machine is beside the one on which the rates of `stages.py` were measured."""

import time

import numpy as np

from fusionroute.runtime.machine import cores

REFERENCE = 290e9  # fp32 operations per second of matrix products on that machine: 2 cores with AVX-512
SIZE, REPEATS, SECONDS = 96, 20, 0.2  # so small that BLAS takes one thread: several wait for each other on a busy machine
MOST_CORES = 8  # more of them hardly help an export


def slowness() -> float:
    """Times that this machine needs for what the reference machine does in one. The best of many tries counts, so that
    other work on the machine matters little.
    """
    matrix = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    product = np.empty_like(matrix)
    best, begun = float("inf"), time.perf_counter()
    while (start := time.perf_counter()) - begun < SECONDS:
        for _ in range(REPEATS):
            np.matmul(matrix, matrix, out=product)
        best = min(best, time.perf_counter() - start)
    return REFERENCE * best / (REPEATS * 2 * SIZE**3) / min(cores(), MOST_CORES)
