# this_file: benchmarks/map_engines.py
"""How each library maps: a block that yields `collect(function, items)`, and one that yields an iterator's maker.

Each is used as its documentation says for the job at hand, with chunks as large as the number of items asks for where
they have to be chosen by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.map_work import COROUTINES, THREADS, WORKERS

Collect = Callable[[Callable[..., Any], Sequence[Any]], list[Any]]


@dataclass(frozen=True, slots=True)
class Engine:
    """One contender of one row.

    Attributes:
        name: As it stands in the table.
        requires: Top-level modules that must be installed.
        block: Context manager that makes its pool and yields what maps.
    """

    name: str
    requires: tuple[str, ...]
    block: Callable[[], Any]


def _share(items: Sequence[Any]) -> int:
    return max(1, len(items) // (4 * WORKERS))


# --- processes ------------------------------------------------------------------------------------


@contextmanager
def opero_processes() -> Iterator[Collect]:
    from opero import operomap

    made: dict[Any, Any] = {}

    def collect(function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        mapped = made.get(function)
        if mapped is None:
            mapped = operomap(mode="process", workers=WORKERS, cache=False)(function)
            made[function] = mapped
        found: list[Any] = mapped(items)
        return found

    yield collect


@contextmanager
def multiprocessing_pool() -> Iterator[Collect]:
    import multiprocessing

    with multiprocessing.Pool(WORKERS) as pool:
        yield pool.map


@contextmanager
def futures_processes() -> Iterator[Collect]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda fn, items: list(pool.map(fn, items, chunksize=_share(items)))


@contextmanager
def loky_processes() -> Iterator[Collect]:
    from loky import ProcessPoolExecutor as Loky

    with Loky(WORKERS) as pool:
        yield lambda fn, items: list(pool.map(fn, items, chunksize=_share(items)))


@contextmanager
def joblib_processes() -> Iterator[Collect]:
    from joblib import Parallel, delayed

    with Parallel(n_jobs=WORKERS) as parallel:
        yield lambda fn, items: list(parallel(delayed(fn)(item) for item in items))


@contextmanager
def mpire_processes() -> Iterator[Collect]:
    from mpire import WorkerPool

    with WorkerPool(WORKERS, keep_alive=True) as pool:
        yield lambda fn, items: list(pool.map(fn, items, concatenate_numpy_output=False))


@contextmanager
def pebble_processes() -> Iterator[Collect]:
    from pebble import ProcessPool

    with ProcessPool(WORKERS) as pool:
        yield lambda fn, items: list(pool.map(fn, items, chunksize=_share(items)).result())


@contextmanager
def twat_processes() -> Iterator[Collect]:
    from twat_mp import ProcessPool

    with ProcessPool(nodes=WORKERS) as pool:
        yield lambda fn, items: list(pool.map(fn, items))


@contextmanager
def pyarallel_processes() -> Iterator[Collect]:
    from pyarallel import parallel_map

    yield lambda fn, items: list(
        parallel_map(fn, items, workers=WORKERS, executor="process").values()
    )


@contextmanager
def streamable_processes() -> Iterator[Collect]:
    from concurrent.futures import ProcessPoolExecutor

    from streamable import stream

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda fn, items: list(stream(items).map(fn, concurrency=pool))


# --- threads --------------------------------------------------------------------------------------


@contextmanager
def opero_threads() -> Iterator[Collect]:
    from opero import operomap

    yield lambda fn, items: operomap(mode="thread", workers=THREADS, cache=False)(fn)(items)


@contextmanager
def futures_threads() -> Iterator[Collect]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(THREADS) as pool:
        yield lambda fn, items: list(pool.map(fn, items))


@contextmanager
def multiprocessing_threads() -> Iterator[Collect]:
    from multiprocessing.pool import ThreadPool

    with ThreadPool(THREADS) as pool:
        yield lambda fn, items: pool.map(fn, items, chunksize=1)


@contextmanager
def joblib_threads() -> Iterator[Collect]:
    from joblib import Parallel, delayed

    with Parallel(n_jobs=THREADS, prefer="threads") as parallel:
        yield lambda fn, items: list(parallel(delayed(fn)(item) for item in items))


@contextmanager
def mpire_threads() -> Iterator[Collect]:
    from mpire import WorkerPool

    with WorkerPool(THREADS, start_method="threading", keep_alive=True) as pool:
        yield lambda fn, items: list(pool.map(fn, items, chunk_size=1))


@contextmanager
def pebble_threads() -> Iterator[Collect]:
    from pebble import ThreadPool

    with ThreadPool(THREADS) as pool:
        yield lambda fn, items: list(pool.map(fn, items).result())


@contextmanager
def twat_threads() -> Iterator[Collect]:
    from twat_mp import ThreadPool

    with ThreadPool(nodes=THREADS) as pool:
        yield lambda fn, items: list(pool.map(fn, items))


@contextmanager
def streamable_threads() -> Iterator[Collect]:
    from streamable import stream

    yield lambda fn, items: list(stream(items).map(fn, concurrency=THREADS))


@contextmanager
def pyarallel_threads() -> Iterator[Collect]:
    from pyarallel import parallel_map

    yield lambda fn, items: list(parallel_map(fn, items, workers=THREADS).values())


# --- event loop -----------------------------------------------------------------------------------


@contextmanager
def _on_a_loop(collect: Callable[..., Any]) -> Iterator[Collect]:
    import asyncio

    with asyncio.Runner() as runner:
        yield lambda fn, items: runner.run(collect(fn, items))


@contextmanager
def opero_loop() -> Iterator[Collect]:
    from opero import operomap

    decorate = operomap(workers=COROUTINES, cache=False)
    with _on_a_loop(lambda fn, items: decorate(fn)(items)) as collect:
        yield collect


@contextmanager
def tasklane_loop() -> Iterator[Collect]:
    from tasklane import amap

    with _on_a_loop(lambda fn, items: amap(fn, items, limit=COROUTINES)) as collect:
        yield collect


@contextmanager
def aiometer_loop() -> Iterator[Collect]:
    from functools import partial

    from aiometer import run_all

    def collected(fn: Callable[..., Any], items: Sequence[Any]) -> Any:
        return run_all([partial(fn, item) for item in items], max_at_once=COROUTINES)

    with _on_a_loop(collected) as collect:
        yield collect


@contextmanager
def streamable_loop() -> Iterator[Collect]:
    from streamable import stream

    async def collected(fn: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        return [found async for found in stream(items).map(fn, concurrency=COROUTINES)]

    with _on_a_loop(collected) as collect:
        yield collect


@contextmanager
def pyarallel_loop() -> Iterator[Collect]:
    from pyarallel import async_parallel_map

    async def collected(fn: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        return list((await async_parallel_map(fn, items, concurrency=COROUTINES)).values())

    with _on_a_loop(collected) as collect:
        yield collect


@contextmanager
def gather_loop() -> Iterator[Collect]:
    import asyncio

    async def collected(fn: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        permits = asyncio.Semaphore(COROUTINES)

        async def one(item: Any) -> Any:
            async with permits:
                return await fn(item)

        return await asyncio.gather(*map(one, items))

    with _on_a_loop(collected) as collect:
        yield collect


OPERO = Engine("opero", ("opero",), opero_processes)
POOL = Engine("multiprocessing", (), multiprocessing_pool)
FUTURES = Engine("concurrent.futures", (), futures_processes)
LOKY = Engine("loky", ("loky",), loky_processes)
JOBLIB = Engine("joblib", ("joblib",), joblib_processes)
MPIRE = Engine("mpire", ("mpire",), mpire_processes)
PEBBLE = Engine("pebble", ("pebble",), pebble_processes)
TWAT = Engine("twat-mp", ("twat_mp",), twat_processes)
STREAMABLE = Engine("streamable", ("streamable",), streamable_processes)
PYARALLEL = Engine("pyarallel", ("pyarallel",), pyarallel_processes)
PROCESSES = (OPERO, POOL, FUTURES, LOKY, JOBLIB, MPIRE, PEBBLE, TWAT, STREAMABLE, PYARALLEL)

THREAD_ENGINES = (
    Engine("opero", ("opero",), opero_threads),
    Engine("concurrent.futures", (), futures_threads),
    Engine("multiprocessing", (), multiprocessing_threads),
    Engine("joblib", ("joblib",), joblib_threads),
    Engine("mpire", ("mpire",), mpire_threads),
    Engine("pebble", ("pebble",), pebble_threads),
    Engine("twat-mp", ("twat_mp",), twat_threads),
    Engine("streamable", ("streamable",), streamable_threads),
    Engine("pyarallel", ("pyarallel",), pyarallel_threads),
)
LOOPS = (
    Engine("opero", ("opero",), opero_loop),
    Engine("tasklane", ("tasklane",), tasklane_loop),
    Engine("pyarallel", ("pyarallel",), pyarallel_loop),
    Engine("aiometer", ("aiometer",), aiometer_loop),
    Engine("streamable", ("streamable",), streamable_loop),
    Engine("gather + semaphore", (), gather_loop),
)
