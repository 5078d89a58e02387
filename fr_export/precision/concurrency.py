"""Several models of a system at a time: small ones keep all cores busy only together."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fusionroute.fr_export.graphs.decoder_blocks import matrices
from fusionroute.fr_export.graphs.graph import Graph
from fusionroute.runtime.machine import cores

MEMORY = 4 << 30  # bytes that all models which are fitted at a time may hold
WHOLE = 2  # matrices in fp32: the one that is rounded, as it is and as it becomes
HESSIANS = 6  # matrices of widest² in fp32: the Hessian, its factor, and the steps between

Advance = Callable[[float], None]
Model = TypeVar("Model")
Result = TypeVar("Result")


class _Stopped(Exception):
    """Another model has failed."""


@dataclass(frozen=True)
class Concurrency:
    """`models` at a time, `threads` for each."""

    models: int
    threads: int

    @classmethod
    def of(cls, models: int, memory: float) -> "Concurrency":
        """For so many models that take `memory` bytes each."""
        at_a_time = max(1, min(cores(), models, int(MEMORY // max(memory, 1))))
        return cls(at_a_time, cores() // at_a_time)

    def each(self, job: Callable[[Model, Advance], Result], models: Iterable[Model], advance: Advance) -> list[Result]:
        """What `job(model, advance)` returns for each model, in their order; torch uses `threads` in it.

        Where a job fails, the others end at the next call of their `advance`, and its error is raised.
        """
        stopped = threading.Event()

        def counted(amount: float) -> None:
            if stopped.is_set():
                raise _Stopped
            advance(amount)

        with ThreadPoolExecutor(self.models, initializer=torch.set_num_threads, initargs=(self.threads,)) as pool:
            futures = [pool.submit(job, model, counted) for model in models]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # an interruption too
                if not all(future.done() and not future.exception() for future in futures):
                    stopped.set()
                    pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next((error for error in errors if not isinstance(error, _Stopped)), errors[0])
        return [future.result() for future in futures]


def fit_memory(largest: int, widest: int) -> int:
    """Bytes that fitting holds beside the texts, where the largest matrix has so many values, the widest so many channels."""
    return 4 * (WHOLE * largest + HESSIANS * widest**2)


def memory_of(graph: Graph) -> int:
    """`fit_memory` of a traced model."""
    widths = matrices(graph)
    return fit_memory(max(int(np.prod(graph.model.graph.initializers[name].shape)) for name in widths), max(widths.values()))
