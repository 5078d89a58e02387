"""Many processes at one evaluation. They end with their parent, however that ends."""

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

Parts = dict[str, Outcomes]


def answer_all(job: Job, pieces: Sequence[Piece], processes: int, advance: Callable[[int], None]) -> list[Parts]:
    """Outcomes by method for each piece, in order. `advance` hears how many prompts were finished; one process is this one.

    Raises what a worker raised, and FusionError where one was killed.
    """
    if processes == 1:
        worker, found = Worker(job), []
        for piece in pieces:
            found.append(worker.answer(piece))
            advance(len(piece.questions))
        return found
    lifeline, end = multiprocessing.Pipe(duplex=False)
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_hold_on_to, initargs=(lifeline,))
    # Ctrl-C is for the parent, which then ends the workers. A blocked signal is inherited, and the workers start at the first task.
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


def _answer(job: Job, piece: Piece) -> Parts:
    return _worker(job).answer(piece)


def _hold_on_to(lifeline: Connection) -> None:
    """End this process at once, in the midst of its work, when the other end is closed: by the parent, or by the parent's death."""

    def watch() -> None:
        lifeline.poll(None)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
