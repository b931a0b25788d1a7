# this_file: tests/composition/test_map_model.py
"""Maps against the plainest of models, a loop: whatever the executor, the options, failures and equal items."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero import operomap
from opero.concurrency.executors.base import Finished, recording
from opero.errors import MapStopped

if TYPE_CHECKING:
    from opero.concurrency.executors.base import ItemOutcome

pytestmark = pytest.mark.internal

ENGINES = [
    ("sync", {"mode": "thread"}),
    ("sync", {"sequential": True}),
    ("async", {"mode": "async"}),
    ("async", {"sequential": True}),
    ("async", {"mode": "thread"}),
]

engines = st.sampled_from(ENGINES)
items_of = st.lists(st.integers(min_value=-3, max_value=12), max_size=30)
shapes = st.fixed_dictionaries(
    {
        "workers": st.integers(min_value=1, max_value=4),
        "chunksize": st.sampled_from(["auto", 1, 2, 7]),
        "ordered": st.booleans(),
        "cache": st.booleans(),
        "retries": st.integers(min_value=0, max_value=1),
    }
)


class RefusedError(Exception):
    pass


def body(x: int) -> int:
    """Fail for negative items, in good time and for good."""
    if x < 0:
        raise RefusedError(x)
    return 10 * x


def decorated(executor: tuple[str, dict[str, Any]], ran: list[int], options: dict[str, Any]) -> Any:
    kind, where = executor

    def counted(x: int) -> int:
        ran.append(x)
        return body(x)

    async def acounted(x: int) -> int:
        await asyncio.sleep(0)
        return counted(x)

    given_options = {"min_delay": 0, "progress": False, **where, **options}
    return operomap(**given_options)(counted if kind == "sync" else acounted)


def waited(begun: Any) -> Any:
    """Wait for a map, or collect a stream."""
    if hasattr(begun, "__aiter__"):

        async def collect() -> list[Any]:
            return [one async for one in begun]

        return asyncio.run(collect())
    if hasattr(begun, "__await__"):

        async def main() -> Any:
            return await begun

        return asyncio.run(main())
    return list(begun) if hasattr(begun, "__next__") else begun


def in_outcomes(found: list[Any]) -> list[Any]:
    return [("failed", one.args[0]) if isinstance(one, RefusedError) else one for one in found]


def model(items: list[int]) -> list[Any]:
    return [10 * x if x >= 0 else ("failed", x) for x in items]


@given(executor=engines, items=items_of, options=shapes, streams=st.booleans())
def test_a_map_gives_what_a_loop_gives(
    executor: Any, items: list[int], options: dict[str, Any], streams: bool
) -> None:
    ran: list[int] = []
    mapped = decorated(executor, ran, {**options, "on_error": "return"})
    found = in_outcomes(waited(mapped.stream(iter(items)) if streams else mapped(items)))
    expected = model(items)
    if options["ordered"]:
        assert found == expected
    else:
        assert Counter(map(repr, found)) == Counter(map(repr, expected))
    calls = Counter(ran)
    attempts = 1 + options["retries"]
    if options["cache"]:
        # What is equal and near is computed once; what failed may be tried again for a later one.
        assert all(calls[x] == 1 for x in set(items) if x >= 0)
        assert all(0 < calls[x] <= attempts * items.count(x) for x in set(items) if x < 0)
    else:
        assert calls == Counter(
            {x: n * (attempts if x < 0 else 1) for x, n in Counter(items).items()}
        )


@given(executor=engines, items=items_of, options=shapes)
def test_a_report_accounts_for_every_item(
    executor: Any, items: list[int], options: dict[str, Any]
) -> None:
    mapped = decorated(executor, [], options)
    seen: list[int] = []
    result = waited(mapped.with_options(on_result=lambda one: seen.append(one.index)).map(items))
    assert sorted(seen) == list(range(len(items))), "each index ends exactly once"
    assert result.by_index() == {n: 10 * x for n, x in enumerate(items) if x >= 0}
    assert [failure.index for failure in result.failures] == [
        n for n, x in enumerate(items) if x < 0
    ]
    assert result.total == result.done == len(items)
    assert result.status == "complete"


@given(
    executor=engines,
    items=items_of,
    options=shapes,
    most=st.integers(min_value=1, max_value=4),
)
def test_a_map_that_stops_never_passes_for_a_complete_one(
    executor: Any, items: list[int], options: dict[str, Any], most: int
) -> None:
    mapped = decorated(executor, [], {**options, "max_errors": most, "on_error": "skip"})
    failing = sum(x < 0 for x in items)
    try:
        found = waited(mapped(items))
    except MapStopped as stopped:
        assert failing >= most
        result = stopped.result
        assert result.status == "stopped"
        assert len(result.failures) >= most
        assert all(value == 10 * items[n] for n, value in result.by_index().items())
    else:
        assert failing < most
        assert Counter(found) == Counter(10 * x for x in items if x >= 0)


@given(executor=engines, options=shapes, taken=st.integers(min_value=0, max_value=12))
def test_a_stream_that_is_left_reads_no_further_than_its_window(
    executor: Any, options: dict[str, Any], taken: int
) -> None:
    pulled = itertools.count()
    last = 0

    def numbers() -> Any:
        nonlocal last
        for last in pulled:  # noqa: UP028 - the last one is looked at
            yield last

    options = {
        **options,
        "chunksize": options["chunksize"] if options["chunksize"] != "auto" else 1,
    }
    mapped = decorated(executor, [], options)

    async def leave() -> list[Any]:
        stream, found = mapped.stream(numbers()), []
        while len(found) < taken:
            found.append(await anext(stream))
        await stream.aclose()
        return found

    if executor[0] == "sync":
        stream = mapped.stream(numbers())
        found = list(itertools.islice(stream, taken))
        stream.close()
    else:
        found = asyncio.run(leave())
    assert len(found) == taken
    # Out of order a batch may be handed out in one go while its neighbours are still to come.
    window = 2 * options["workers"] * options["chunksize"]
    if taken:
        assert last + 1 <= max(max(found) // 10 + 1, taken) + 2 * window


class Some:
    """Returns what it was given before."""

    def __init__(self, known: dict[int, ItemOutcome]) -> None:
        self.known = known

    def enter(self, index: int, item: Any) -> None: ...

    def find_known(self, idx: Sequence[int], items: Sequence[Any]) -> Mapping[int, ItemOutcome]:
        return {n: self.known[n] for n in idx if n in self.known}

    def keep(self, finished: Sequence[Finished]) -> None:
        for index, _, outcome in finished:
            assert index not in self.known
            self.known[index] = outcome

    def close(self) -> None: ...


@given(executor=engines, items=items_of, options=shapes, cut=st.integers(min_value=0, max_value=30))
def test_a_map_that_was_cut_short_and_recorded_ends_as_one_that_was_not(
    executor: Any, items: list[int], options: dict[str, Any], cut: int
) -> None:
    ran: list[int] = []
    recorder = Some({})
    token = recording.set(lambda name: recorder)
    try:
        first = decorated(executor, ran, {**options, "on_error": "return"})
        waited(first(items[:cut]))
        before = len(ran)
        second = decorated(executor, ran, {**options, "on_error": "return"})
        result = waited(second.map(items))
    finally:
        recording.reset(token)
    assert result.by_index() == {n: 10 * x for n, x in enumerate(items) if x >= 0}
    assert result.resumed == len(items[:cut])
    assert Counter(ran[before:]).keys() <= set(items[cut:])
    assert sorted(recorder.known) == list(range(len(items)))
