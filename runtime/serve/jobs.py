"""Texts generated in threads, and their tokens as they come on the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import FusionError
from fusionroute.runtime.serve.admission import Admission
from fusionroute.runtime.serve.errors import ApiError
from fusionroute.runtime.serve.metrics import Metrics
from fusionroute.runtime.text import Token


class Prompt(NamedTuple):
    """A prompt was encoded."""

    tokens: int


class Finish(NamedTuple):
    """A text is over. drafted, accepted: see `Result`."""

    choice: int
    reason: str
    drafted: int
    accepted: int


Event = Prompt | Finish | tuple[int, Token]  # a token with the number of its choice


@dataclass
class Order:
    """What to generate, by which runtime: `count` texts for each prompt, which is encoded when it is its turn.

    options: those of `FusionRuntime.stream`. max_new_tokens None: as many as the context has room for.
    """

    runtime: FusionRuntime
    prompts: Sequence[Callable[[], list[int]]]
    count: int
    max_new_tokens: int | None
    options: Mapping[str, Any]


@dataclass(eq=False)  # a job is itself alone
class Job:
    """One request that has a session."""

    arrival: float  # of time.perf_counter
    cancel: threading.Event = field(default_factory=threading.Event)
    events: asyncio.Queue[Event | BaseException | None] = field(default_factory=asyncio.Queue)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None  # seconds from the arrival
    finish: str | None = None  # the last reason

    async def follow(self) -> AsyncIterator[Event]:
        """Events until all texts are over. Left early, it cancels them. Raises FusionError."""
        try:
            while (event := await self.events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.cancel.set()


class Jobs:
    """All jobs of a server."""

    def __init__(self, admission: Admission, metrics: Metrics, seconds: float):
        self._admission, self._metrics, self._seconds = admission, metrics, seconds
        self._threads = ThreadPoolExecutor(admission.sessions, "fusionroute-serve")
        self._running: set[Job] = set()

    async def start(self, order: Order, arrival: float) -> Job:
        """Wait for a session, and begin. The first prompt is encoded, and all options are checked, when this returns.

        Raises ApiError as `Admission.enter`, and 504 where the time is over; FusionError for wrong options.
        """
        try:
            await asyncio.wait_for(self._admission.enter(), max(self._left(arrival), 0.001))
        except asyncio.TimeoutError as error:
            raise ApiError(504, f"The request waited for {self._seconds:g} s, which is all that it may take.") from error
        job, loop, began = Job(arrival), asyncio.get_running_loop(), time.perf_counter()

        def over(_: object) -> None:
            self._running.discard(job)
            self._admission.leave(time.perf_counter() - began)

        thread = loop.run_in_executor(self._threads, self._generate, job, order, loop)
        self._running.add(job)
        thread.add_done_callback(over)
        try:
            first = await job.events.get()
        except BaseException:
            job.cancel.set()
            raise
        if isinstance(first, BaseException):
            raise first
        assert isinstance(first, Prompt)
        job.prompt_tokens = first.tokens
        self._metrics.prompt_tokens.inc(first.tokens)
        return job

    def cancel_all(self) -> None:
        """End every text within a token; those that wait are refused."""
        self._admission.turn_away()
        for job in self._running:
            job.cancel.set()

    def close(self) -> None:
        """Wait for the threads."""
        self.cancel_all()
        self._threads.shutdown()

    def _left(self, arrival: float) -> float:
        return self._seconds - (time.perf_counter() - arrival)

    def _generate(self, job: Job, order: Order, loop: asyncio.AbstractEventLoop) -> None:
        def tell(event: Event | BaseException | None) -> None:
            loop.call_soon_threadsafe(job.events.put_nowait, event)

        try:
            choice = 0
            for encode in order.prompts:
                ids = encode()
                for each in range(order.count):
                    self._text(job, order, ids, choice, each, tell)
                    choice += 1
        except FusionError as error:
            tell(error)
        except Exception as error:
            tell(error)
            raise
        finally:
            tell(None)

    def _text(
        self, job: Job, order: Order, ids: list[int], choice: int, each: int, tell: Callable[[Event | BaseException | None], None]
    ) -> None:
        options = dict(order.options)
        if options.get("seed") is not None:
            options["seed"] += each
        room = order.runtime.max_seq_len - len(ids)
        most = room if order.max_new_tokens is None else order.max_new_tokens
        stream = order.runtime.stream(ids, max(most, 1), cancel=job.cancel, deadline=self._left(job.arrival), **options)
        with closing(stream):
            if not each:
                tell(Prompt(len(ids)))
            last, expert = time.perf_counter(), None
            metrics = self._metrics
            for token in stream:
                now = time.perf_counter()
                if job.first_token is None:
                    job.first_token = now - job.arrival
                    metrics.first.observe(job.first_token)
                elif expert is not None:
                    metrics.each.observe(now - last)
                metrics.tokens.labels(token.expert).inc()
                if expert is not None and expert != token.expert:
                    metrics.switches.inc()
                last, expert = now, token.expert
                job.completion_tokens += 1
                tell((choice, token))
            metrics.drafted.inc(stream.drafted)
            metrics.accepted.inc(stream.accepted)
        job.finish = stream.finish_reason or "cancelled"
        tell(Finish(choice, job.finish, stream.drafted, stream.accepted))
