# this_file: benchmarks/map_streams.py
"""How each library streams: a block that yields `stream(function, items)`, which returns an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.map_engines import Engine
from benchmarks.map_work import WORKERS

__all__ = ["ONE_BY_ONE", "STREAMS"]

Stream = Callable[[Callable[..., Any], Iterable[Any]], Iterator[Any]]
_CHUNK = 1_000
"""Items per dispatch where the library leaves that to the user."""


@contextmanager
def opero_stream() -> Iterator[Stream]:
    from opero import operomap

    yield lambda fn, items: operomap(mode="process", workers=WORKERS, cache=False)(fn).stream(items)


@contextmanager
def multiprocessing_stream() -> Iterator[Stream]:
    import multiprocessing

    with multiprocessing.Pool(WORKERS) as pool:
        yield lambda fn, items: pool.imap(fn, items, chunksize=_CHUNK)


@contextmanager
def futures_stream() -> Iterator[Stream]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda fn, items: pool.map(fn, items, chunksize=_CHUNK)


@contextmanager
def loky_stream() -> Iterator[Stream]:
    from loky import ProcessPoolExecutor as Loky

    with Loky(WORKERS) as pool:
        yield lambda fn, items: pool.map(fn, items, chunksize=_CHUNK)


@contextmanager
def joblib_stream() -> Iterator[Stream]:
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=WORKERS, return_as="generator")
    yield lambda fn, items: parallel(delayed(fn)(item) for item in items)


@contextmanager
def mpire_stream() -> Iterator[Stream]:
    from mpire import WorkerPool

    with WorkerPool(WORKERS) as pool:
        yield lambda fn, items: pool.imap(fn, items, chunk_size=_CHUNK)


@contextmanager
def mpire_stream_small() -> Iterator[Stream]:
    from mpire import WorkerPool

    with WorkerPool(WORKERS) as pool:
        yield lambda fn, items: pool.imap(fn, items, iterable_len=20_000)


@contextmanager
def pebble_stream() -> Iterator[Stream]:
    from pebble import ProcessPool

    with ProcessPool(WORKERS) as pool:
        yield lambda fn, items: pool.map(fn, items, chunksize=_CHUNK).result()


@contextmanager
def twat_stream() -> Iterator[Stream]:
    from twat_mp import ProcessPool

    with ProcessPool(nodes=WORKERS) as pool:
        yield lambda fn, items: pool.imap(fn, items, chunksize=_CHUNK)


@contextmanager
def streamable_stream() -> Iterator[Stream]:
    from concurrent.futures import ProcessPoolExecutor

    from streamable import stream

    with ProcessPoolExecutor(WORKERS) as pool:
        yield lambda fn, items: iter(stream(items).map(fn, concurrency=pool))


@contextmanager
def pyarallel_stream() -> Iterator[Stream]:
    from pyarallel import parallel_iter

    yield lambda fn, items: iter(
        one.value
        for one in parallel_iter(fn, items, workers=WORKERS, executor="process", ordered=True)
    )


STREAMS = (
    Engine("opero", ("opero",), opero_stream),
    Engine("multiprocessing", (), multiprocessing_stream),
    Engine("concurrent.futures", (), futures_stream),
    Engine("loky", ("loky",), loky_stream),
    Engine("joblib", ("joblib",), joblib_stream),
    Engine("mpire", ("mpire",), mpire_stream),
    Engine("pebble", ("pebble",), pebble_stream),
    Engine("twat-mp", ("twat_mp",), twat_stream),
)
ONE_BY_ONE = (
    Engine("opero", ("opero",), opero_stream),
    Engine("mpire", ("mpire",), mpire_stream_small),
    Engine("streamable", ("streamable",), streamable_stream),
    Engine("pyarallel", ("pyarallel",), pyarallel_stream),
    *STREAMS[1:5],
)
