"""Progress where stderr is no terminal: a line every few seconds, by a clock of the test's own."""

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from fusionroute.fr_export.console.lines import EVERY, Lines, count, duration
from fusionroute.fr_export.console.progress import Stages


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Job:
    """A job that looks at its progress every second, as the thread does."""

    def __init__(self) -> None:
        self.clock, self.file = Clock(), io.StringIO()
        self.lines = Lines(Console(file=self.file, width=80), self.clock)
        self.printed_at: list[float] = []

    def work(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock.now += 1
            before = len(self.shown)
            self.lines.look()
            self.printed_at += [self.clock.now] * (len(self.shown) - before)

    @property
    def shown(self) -> list[str]:
        return self.file.getvalue().splitlines()


@pytest.fixture
def job() -> Iterator[Job]:
    yield Job()


def test_what_is_done_quickly_prints_nothing(job: Job) -> None:
    advance = job.lines.begin("tracing", 2)
    job.work(int(EVERY) - 1)
    advance(2)
    job.lines.end()
    assert job.shown == []


def test_lines_tell_the_share_the_time_and_the_rest(job: Job) -> None:
    advance = job.lines.begin("writing int8 for ort:cpu", 200e6)
    job.work(4)
    advance(50e6)
    job.work(1)
    assert job.shown == ["writing int8 for ort:cpu: 50.0M of 200M, 25%, 5 s, about 15 s left"]
    advance(100e6)
    job.work(5)
    job.lines.end()
    assert job.shown[1:] == ["writing int8 for ort:cpu: 150M of 200M, 75%, 10 s, about 3 s left", "writing int8 for ort:cpu: done in 10 s"]


def test_it_is_never_silent_for_long_however_the_stages_are_cut(job: Job) -> None:
    """Stages of three seconds print nothing of their own, but together they are not silent."""
    for number in range(8):
        job.lines.begin(f"stage {number}", None)
        job.work(3)
        job.lines.end()
    waits = [after - before for before, after in zip([1000.0, *job.printed_at], [*job.printed_at, job.clock.now], strict=True)]
    assert max(waits) <= EVERY + 1
    assert job.shown[:4] == ["stage 1: 2 s", "stage 1: done in 3 s", "stage 3: 2 s", "stage 3: done in 3 s"]


def test_nothing_is_divided_by_a_total_that_nobody_knows_and_no_share_is_above_one(job: Job) -> None:
    job.lines.begin("checking", None)
    job.work(6)
    advance = job.lines.begin("recording", 2)
    advance(3)
    job.work(5)
    assert job.shown == ["checking: 5 s", "recording: 3 of 2, 100%, 4 s, about 0 s left"]
    job.lines.begin("waiting", 2)
    job.work(5)
    assert job.shown[2:] == ["waiting: 0 of 2, 0%, 4 s"]


def test_between_stages_nothing_is_said(job: Job) -> None:
    job.lines.begin("tracing", 1)
    job.lines.end()
    job.work(60)
    assert job.shown == []


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (125, "2:05 min"), (3725, "1:02:05 h")])
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(("value", "shown"), [(7, "7"), (1536, "1,536"), (12_345, "12.3k"), (134_515_008, "135M"), (2.6e9, "2.6G")])
def test_counts(value: float, shown: str) -> None:
    assert count(value) == shown


def test_a_terminal_gets_bars_within_80_columns_and_everything_else_lines() -> None:
    file = io.StringIO()
    stages = Stages(Console(file=file, force_terminal=True, width=80))
    with stages.progress, stages.stage("comparing int8-wo for tensorrt:10.3", 4) as advance:
        advance(1)
    stages.note("a note")
    assert "━" in file.getvalue() and "100%" in file.getvalue() and "…" not in file.getvalue()
    for console in (Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})):
        assert isinstance(Stages(console).progress, Lines)


def test_the_thread_ends_with_the_job() -> None:
    before = set(threading.enumerate())  # those of earlier tests may end meanwhile
    stages = Stages(Console(file=io.StringIO()))
    with stages.progress, stages.stage("short"):
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before
    assert [stage["name"] for stage in stages.report()] == ["short"]
