"""Jobs on several threads whose results come in order."""

import threading
from functools import partial

import pytest

from fusionroute.calibration.in_order import in_order


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_come_in_the_order_of_the_jobs(threads: int, count: int) -> None:
    assert list(in_order([partial(int, number) for number in range(count)], threads)) == list(range(count))


@pytest.mark.parametrize("threads", [2, 3])
def test_so_many_jobs_run_at_once(threads: int) -> None:
    """Each waits for the others."""
    meeting = threading.Barrier(threads, timeout=60)
    assert len(list(in_order([meeting.wait] * threads, threads))) == threads


@pytest.mark.parametrize(("threads", "count"), [(1, 3), (3, 1)])
def test_without_others_a_job_runs_in_the_caller_s_thread(threads: int, count: int) -> None:
    assert set(in_order([threading.current_thread] * count, threads)) == {threading.current_thread()}


def test_jobs_are_begun_no_further_ahead_than_there_are_threads() -> None:
    begun: list[int] = []
    results = in_order([partial(begun.append, number) for number in range(9)], 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert sorted(begun) == list(range(len(begun))) and len(begun) <= 3
