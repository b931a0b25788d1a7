# this_file: tests/concurrency/test_checkpoint.py
"""Checkpoints: a run that was killed goes on, pays for nothing twice, and ends as one that was not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opero import operomap
from opero.concurrency.checkpoint import CheckpointFile
from opero.errors import OperoUsageError, OperoWarning, StoreError

pytestmark = pytest.mark.internal

RAN: list[Any] = []


def double(x: Any, *, times: int = 2) -> Any:
    RAN.append(x)
    return times * x


async def adouble(x: Any, *, times: int = 2) -> Any:
    RAN.append(x)
    return times * x


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    RAN.clear()
    yield
    RAN.clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def over(run: Path, fn: Any = double, **options: Any) -> Any:
    return operomap(checkpoint=run, cache=False, mode="thread", retries=0, **options)(fn)


def test_a_later_run_takes_up_what_is_written(run: Path) -> None:
    assert over(run)([1, 2]) == [2, 4]
    result = over(run).map([1, 2, 3])
    assert result.values == [2, 4, 6]
    assert (result.resumed, RAN) == (2, [1, 2, 3])
    assert "2 resumed" in repr(result)


def test_an_event_loop_does_not_wait_for_the_file(run: Path) -> None:
    async def main() -> Any:
        mapped = operomap(checkpoint=run, cache=False)(adouble)
        first = await mapped.map(range(50))
        return first, await mapped.map(range(60))

    first, second = asyncio.run(main())
    assert (first.resumed, second.resumed) == (0, 50)
    assert second.values == [2 * x for x in range(60)]


def test_failures_are_not_written_and_tried_again(run: Path) -> None:
    def fail(x: int) -> float:
        return 1 / x

    assert over(run, fail).map([1, 0]).resumed == 0
    second = over(run, fail).map([1, 0])
    assert second.resumed == 1
    assert [failure.index for failure in second.failures] == [1]


def test_a_rejected_result_is_not_written(run: Path) -> None:
    picky = over(run, retry_if_result=lambda result: result == 2)
    picky([1, 2])
    RAN.clear()
    picky([1, 2])
    assert RAN == [1]


def test_further_arguments_and_the_version_tell_runs_apart(run: Path) -> None:
    assert over(run)([1]) == [2]
    assert over(run)([1], times=5) == [5]
    assert over(run, cache_version=2)([1]) == [2]
    assert RAN == [1, 1, 1]
    assert over(run)([1], times=5) == [5]
    assert len(RAN) == 3


def test_functions_share_a_file_and_nothing_in_it(run: Path) -> None:
    assert over(run)([1]) == [2]
    assert over(run, lambda x: -x)([1]) == [-1]


def test_checkpoint_keys_differ_by_what_a_function_closes_over(run: Path) -> None:
    def times(n: int) -> Any:
        return over(run, lambda x: n * x)

    assert times(2)([1]) == [2]
    assert times(3)([1]) == [3]


def test_an_item_is_what_its_key_says(run: Path) -> None:
    class Page:
        """It has no content that could be compared."""

        def __init__(self, number: int) -> None:
            self.number = number
            self.lock = threading.Lock()

    def read(page: Page) -> int:
        RAN.append(page.number)
        return page.number

    mapped = over(run, read, item_key=lambda page: page.number)
    assert mapped([Page(1), Page(2)]) == [1, 2]
    assert mapped([Page(2), Page(3)]) == [2, 3]
    assert RAN == [1, 2, 3]
    with pytest.raises(OperoUsageError, match="item_key="):
        over(run, read)([Page(1)])
    with pytest.raises(OperoUsageError, match="as text or a number, from item_key="):
        over(run, read, item_key=lambda page: page.lock)([Page(1)])


def test_a_function_bound_to_what_has_no_content_is_refused_with_what_helps(run: Path) -> None:
    class Client:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, x: int) -> int:
            RAN.append(x)
            return x

    client = Client()

    def call(x: int) -> int:
        return client(x)

    for fn in (client, client.__call__, call):
        # No key for the items would tell this client from another one.
        with pytest.raises(OperoUsageError, match="as an argument which cache_ignore") as caught:
            over(run, fn, item_key=str)([1])
        assert "item_key" not in str(caught.value)
        assert "Client has no content" in str(caught.value)
    mapped = over(run, lambda x, client: client(x), cache_ignore=("client",))
    assert (mapped([1], client), mapped([1], Client()), RAN) == ([1], [1], [1])


def test_clients_among_the_arguments_are_left_out_by_name(run: Path) -> None:
    def fetch(x: int, client: Any) -> int:
        RAN.append(x)
        return x

    with pytest.raises(OperoUsageError, match="cache_ignore="):
        over(run, fetch)([1], threading.Lock())
    mapped = over(run, fetch, cache_ignore=("client",))
    mapped([1], threading.Lock())
    mapped([1], threading.Lock())
    assert RAN == [1]


def test_results_come_back_as_they_were(run: Path) -> None:
    values = [None, {"a": (1, [2.5])}, b"bytes", {1, 2}, Path("x")]
    mapped = over(run, lambda n: values[n])
    assert mapped(range(5)) == values
    again = over(run, lambda n: values[n]).map(range(5))
    assert again.values == values
    assert [type(value) for value in again.values] == [type(value) for value in values]
    assert again.resumed == 5


def test_what_cannot_be_written_is_said_once_and_run_again(run: Path) -> None:
    mapped = over(run, lambda x: (RAN.append(x), threading.Lock())[1])
    with pytest.warns(OperoWarning, match="cannot be written to the checkpoint") as warned:
        mapped([1, 2])
    assert len(warned) == 1
    with pytest.warns(OperoWarning):
        mapped([1])
    assert RAN == [1, 2, 1]


def test_a_stream_is_resumed_too(run: Path) -> None:
    with_run = over(run, workers=1, chunksize=1)
    stream = with_run.stream(itertools.count())
    assert list(itertools.islice(stream, 10)) == [2 * x for x in range(10)]
    stream.close()
    done = len(RAN)
    assert list(itertools.islice(with_run.stream(itertools.count()), 10)) == list(range(0, 20, 2))
    assert len(RAN) - done <= 4, "only what is read ahead"


@pytest.mark.parametrize("what", ["text", "database"])
def test_a_file_that_is_something_else_is_not_touched(run: Path, what: str) -> None:
    if what == "text":
        run.write_text("my novel " * 100)
    else:
        with sqlite3.connect(run) as other:
            other.execute("CREATE TABLE novel (page)")
        other.close()
    before = run.read_bytes()
    with pytest.raises(StoreError, match=r"run\.db"):
        over(run)([1])
    assert run.read_bytes() == before
    assert RAN == []


def test_checkpoint_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        over(tmp_path / "nowhere" / "run.db")([1])


@pytest.mark.timeout(120)
def test_a_journal_gives_back_exactly_what_was_written(run: Path) -> None:
    journal, numbers = CheckpointFile(run), itertools.count()

    # One file for all examples: a new one costs the disk's time.
    @settings(max_examples=40)
    @given(
        written=st.dictionaries(st.text(max_size=5), st.binary(max_size=20), max_size=20),
        asked=st.lists(st.text(max_size=5), max_size=20),
    )
    def check(written: dict[str, bytes], asked: list[str]) -> None:
        example = next(numbers)
        rows = {f"{example}:{key}": blob for key, blob in written.items()}
        journal.put(rows.items())
        keys = [*(f"{example}:{key}" for key in asked), *rows]
        assert journal.find(keys) == {key: rows[key] for key in keys if key in rows}

    check()
    journal.close()


def test_a_damaged_file_is_set_aside_and_begun_anew(run: Path) -> None:
    journal = CheckpointFile(run)
    journal.put([("a", b"1" * 10_000)])
    journal.close()
    run.write_bytes(run.read_bytes()[:5000])
    with pytest.warns(OperoWarning, match=r"checkpoint .* was damaged .* set aside as .*damaged-"):
        assert journal.find(["a"]) == {}
    journal.put([("a", b"2")])
    assert journal.find(["a"]) == {"a": b"2"}
    journal.close()


@pytest.mark.parametrize("damage", ["NULL", "1e300", "'text'", "x'00ff'", "CAST(x'ff' AS TEXT)"])
def test_an_item_whose_entry_is_damaged_is_run_again(run: Path, damage: str) -> None:
    assert over(run)([1, 2]) == [2, 4]
    with contextlib.closing(sqlite3.connect(run)) as db, contextlib.suppress(sqlite3.Error), db:
        db.execute(f"UPDATE results SET result = {damage}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OperoWarning)  # a file that cannot be read is set aside
        assert over(run)([1, 2]) == [2, 4]


def test_a_file_deleted_in_use_is_begun_anew(run: Path) -> None:
    journal = CheckpointFile(run)
    journal.put([("a", b"1")])
    for path in run.parent.glob(f"{run.name}*"):
        path.unlink()
    journal.put([("b", b"2")])
    assert CheckpointFile(run).find(["a", "b"]) == {"b": b"2"}
    journal.close()


def test_many_keys_are_found_at_once(run: Path) -> None:
    journal = CheckpointFile(run)
    journal.put((str(n), b"x") for n in range(3000))
    assert len(journal.find([str(n) for n in range(5000)])) == 3000
    journal.close()


PROGRAM = """
import asyncio, os, signal, sys
from opero import operomap

folder, mode, memory, deadly = sys.argv[1:]

def step(x):
    with open(os.path.join(folder, "ran"), "a") as file:
        file.write(f"{x}\\n")
    if deadly == str(x):
        os.kill(int(os.environ["PROGRAM"]), signal.SIGKILL)
        signal.pause()
    return x * x

async def astep(x):
    await asyncio.sleep(0.001)
    return step(x)

os.environ["PROGRAM"] = str(os.getpid())
kept = {"checkpoint": os.path.join(folder, "run.db"), "cache": False}
if memory == "disk":
    kept = {"cache_backend": "disk:" + os.path.join(folder, "cache"), "cache_ttl": None}
awaits = mode.startswith("async")
mapped = operomap(mode=mode, workers=2, chunksize=5, **kept)(astep if awaits else step)
result = mapped.map(range(120))
if awaits:
    result = asyncio.run(result)
assert result.values == [x * x for x in range(120)], result
print(result.resumed + result.hits)
"""


@pytest.mark.parametrize(
    ("mode", "memory"),
    [
        ("thread", "checkpoint"),
        ("process", "disk"),
        ("async", "disk"),
        ("async_process", "checkpoint"),
    ],
)
def test_a_killed_run_goes_on_and_pays_for_nothing_twice(
    tmp_path: Path, mode: str, memory: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))

    def begin(deadly: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(program), str(tmp_path), mode, memory, deadly],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert begin("60").returncode == -9
    known = (tmp_path / "ran").read_text().split()
    (tmp_path / "ran").unlink()
    second = begin("none")
    assert second.returncode == 0, second.stderr
    again = (tmp_path / "ran").read_text().split()
    resumed = int(second.stdout)
    assert resumed + len(again) == 120, "each item was resumed or run, none both"
    # At most what was under way, or finished in the last moments, was paid for and lost:
    # the chunks at each worker and those at hand, or as many as are in flight in event loops.
    assert len(set(known) & set(again)) <= (70 if mode == "async_process" else 40)
