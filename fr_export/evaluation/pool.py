"""Spread an evaluation over processes. They end with their parent, however that ends."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from fusionroute.fr_export.evaluation.outcomes import Outcomes
from fusionroute.fr_export.evaluation.worker import Job, Piece, Worker
from fusionroute.runtime.errors import FusionError

PieceOutcomes = dict[str, Outcomes]
"""method → the outcomes of one piece."""


def answer_all(job: Job, pieces: Sequence[Piece], processes: int, advance: Callable[[int], None]) -> list[PieceOutcomes]:
    """Outcomes by method for each piece, in order. A single process is this one.

    `advance` is called with the number of questions of every finished piece. Raises the errors of workers, and
    FusionError where one was killed.
    """
    if processes == 1:
        worker, outcomes = Worker(job), []
        for piece in pieces:
            outcomes.append(worker.answer(piece))
            advance(len(piece.questions))
        return outcomes
    lifeline, end = multiprocessing.Pipe(duplex=False)
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_hold_on_to, initargs=(lifeline,))
    # The parent handles Ctrl-C and ends the workers. They inherit the blocked signal, since they start at the first
    # task.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = {executor.submit(_answer, job, piece): piece for piece in pieces}
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            future.result()
            advance(len(futures[future].questions))
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise FusionError("A process of the evaluation was killed, perhaps for want of memory: try fewer with --jobs.") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        end.close()
        executor.shutdown(cancel_futures=True)
        lifeline.close()


@functools.lru_cache(maxsize=1)
def _worker(job: Job) -> Worker:
    return Worker(job)


def _answer(job: Job, piece: Piece) -> PieceOutcomes:
    return _worker(job).answer(piece)


def _hold_on_to(lifeline: Connection) -> None:
    """End this process at once, even in the middle of its work, when the parent closes the other end or dies."""

    def watch() -> None:
        lifeline.poll(None)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
