"""Turns in the order of arrival, a bounded queue, and nothing lost where waiting is given up."""

import asyncio

import psutil
import pytest

from fusionroute.runtime.serve.admission import Admission
from fusionroute.runtime.serve.errors import ApiError
from fusionroute.runtime.serve.settings import kv_budget, sessions_within


def test_turns_come_in_order_and_the_queue_is_bounded() -> None:
    async def run() -> None:
        admission, order = Admission(2, 3), list[int]()

        async def request(number: int) -> None:
            await admission.enter()
            order.append(number)

        tasks = [asyncio.create_task(request(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert (order, admission.running, admission.waiting) == ([0, 1], 2, 3)
        with pytest.raises(ApiError) as refused:
            await admission.enter()
        assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "2"}  # 1 s each, 4 of them, 2 at once
        assert str(refused.value) == "3 requests wait already: try again in 2 s."
        tasks[3].cancel()
        await asyncio.sleep(0)
        assert admission.waiting == 2
        for _ in range(4):
            admission.leave(21.0)
            await asyncio.sleep(0)
        assert (order, admission.running, admission.waiting) == ([0, 1, 2, 4], 0, 0)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_turn_that_was_given_up_goes_to_the_next() -> None:
    async def run() -> None:
        admission = Admission(1, 3)
        await admission.enter()
        first, second = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        admission.leave(1.0)  # the first one's turn,
        first.cancel()  # which is given up before it notices
        await asyncio.wait_for(second, 1)
        assert (admission.running, admission.waiting) == (1, 0)
        admission.leave(1.0)
        assert admission.running == 0

    asyncio.run(run())


def test_the_end_refuses_those_that_wait_and_those_that_come() -> None:
    async def run() -> None:
        admission = Admission(1, 3)
        await admission.enter()
        waiting = asyncio.create_task(admission.enter())
        await asyncio.sleep(0)
        admission.draining = True
        admission.turn_away()
        for attempt in (waiting, asyncio.create_task(admission.enter())):
            with pytest.raises(ApiError, match="shutting down") as refused:
                await attempt
            assert refused.value.status == 503
        admission.leave(1.0)
        assert admission.running == 0

    asyncio.run(run())


def test_sessions_fit_the_budget() -> None:
    """Finished texts that are kept make room for them."""
    assert [sessions_within(budget, 100) for budget in (1, 199, 200, 399, 100_000)] == [1, 1, 2, 3, 1000]
    assert sessions_within(100_000, 100, 16) == 16 and sessions_within(1, 100, 16) == 1


def test_the_budget_is_what_was_given_or_half_of_what_is_free() -> None:
    assert kv_budget(5, None) == kv_budget(5, 3) == 5
    assert kv_budget(None, 3) is None, "who says how many texts there are bounds them so"
    half = kv_budget(None, None)
    assert half is not None and half == pytest.approx(psutil.virtual_memory().available / 2, rel=0.2)
