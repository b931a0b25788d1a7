# this_file: tests/durable/test_replay_order.py
"""Outcomes reach their tasks one after another, each when all that the one before has set going is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from opero.durable.journal import ReplayOrder, order_of

pytestmark = pytest.mark.internal


class Outcomes:
    """Futures whose outcomes wait for their turn."""

    def __init__(self, count: int, turns: ReplayOrder | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.turns = turns or order_of(self.loop)
        self.futures = [self.loop.create_future() for _ in range(count)]

    def queue(self, *order: int) -> None:
        for place, number in enumerate(order):
            self.turns.queue("line", place, lambda n=number: self.futures[n].set_result(n))


def bare(loop: asyncio.AbstractEventLoop) -> ReplayOrder:
    """The turns of a loop that hides what it is about to run."""
    turns = ReplayOrder(loop)
    turns._ready = None
    return turns


@pytest.fixture(params=[order_of, bare], ids=["asyncio", "another loop"])
def turns(request: pytest.FixtureRequest) -> Callable[[asyncio.AbstractEventLoop], ReplayOrder]:
    return request.param  # type: ignore[no-any-return]  # pytest does not tell


def test_outcomes_are_handed_out_one_at_a_time(
    turns: Callable[[asyncio.AbstractEventLoop], ReplayOrder],
) -> None:
    async def main() -> list[list[int]]:
        outcomes = Outcomes(200, turns(asyncio.get_running_loop()))
        waiting = {asyncio.create_task(_wrapped(future)) for future in outcomes.futures}
        await asyncio.sleep(0)
        outcomes.queue(*reversed(range(200)))
        won = []
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            won.append([task.result() for task in done])
        return won

    assert asyncio.run(main()) == [[n] for n in reversed(range(200))]


async def _wrapped(future: asyncio.Future[int]) -> int:
    return await future


def test_what_an_outcome_sets_going_comes_before_the_next() -> None:
    async def main() -> list[str]:
        outcomes = Outcomes(2)
        said: list[str] = []

        async def consequences(number: int) -> None:
            await outcomes.futures[number]
            for step in range(5):
                said.append(f"{number}.{step}")
                await asyncio.sleep(0)

        outcomes.queue(1, 0)
        await asyncio.gather(consequences(0), consequences(1))
        return said

    assert asyncio.run(main()) == [f"{n}.{step}" for n in (1, 0) for step in range(5)]


def test_a_loop_that_never_rests_does_not_stop_the_rest() -> None:
    async def main() -> None:
        outcomes = Outcomes(3)

        def restless() -> None:
            outcomes.loop.call_soon(restless)

        restless()
        outcomes.queue(0, 1, 2)
        assert await asyncio.gather(*outcomes.futures) == [0, 1, 2]

    asyncio.run(main())


def test_an_outcome_that_ends_the_program_leaves_the_others_their_turn() -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> Outcomes:
        outcomes = Outcomes(3)
        # Called when the outcome is given, not in a task, which would take the exit for its own.
        outcomes.futures[0].add_done_callback(_exit)
        outcomes.queue(0, 1, 2)
        return outcomes

    outcomes = loop.run_until_complete(begin())
    with pytest.raises(SystemExit):
        loop.run_until_complete(asyncio.sleep(10))
    assert loop.run_until_complete(outcomes.futures[2]) == 2
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def _exit(_: object) -> None:
    raise SystemExit(3)


def test_a_loop_that_shall_stop_does() -> None:
    loop = asyncio.new_event_loop()

    async def begin() -> Outcomes:
        outcomes = Outcomes(2)
        outcomes.futures[0].add_done_callback(lambda _: loop.stop())
        outcomes.queue(0, 1)
        return outcomes

    outcomes = loop.run_until_complete(begin())
    loop.run_forever()
    assert [future.done() for future in outcomes.futures] == [True, False]
    assert loop.run_until_complete(outcomes.futures[1]) == 1
    loop.close()
