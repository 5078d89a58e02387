"""Who may generate now, who waits, and who is told to come later."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from fusionroute.runtime.serve.errors import ApiError


class Admission:
    """`sessions` at once, in the order of arrival; `queue` may wait. Used from the event loop alone."""

    def __init__(self, sessions: int, queue: int):
        self.sessions, self._queue = sessions, queue
        self._free, self._waiting = sessions, deque[asyncio.Future[None]]()
        self._mean_seconds = 1.0  # of the requests so far, newer ones count more
        self.draining = False

    @property
    def running(self) -> int:
        """Requests that generate."""
        return self.sessions - self._free

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Wait for a session. Raises ApiError: 429 beyond the queue, 503 where the server shuts down."""
        if self.draining:
            raise ApiError(503, "The server is shutting down: send the request to another one.", retry_after=1)
        if self._free:
            self._free -= 1
            return
        if len(self._waiting) >= self._queue:
            seconds = max(1, math.ceil(self._mean_seconds * (len(self._waiting) + 1) / self.sessions))
            raise ApiError(429, f"{len(self._waiting)} requests wait already: try again in {seconds} s.", "queue_full", None, seconds)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()  # it was this request's turn already
            else:
                self._waiting.remove(turn)
            raise

    def leave(self, seconds: float) -> None:
        """A request that had a session for so long is over."""
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def turn_away(self) -> None:
        """Refuse all that wait."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(ApiError(503, "The server is shutting down: send the request to another one.", retry_after=1))
