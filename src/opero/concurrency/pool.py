# this_file: src/opero/concurrency/pool.py
"""twat-mp's room: every thread and process map of opero runs inside its `MultiPool`.

Its own process pool waits for ever for a worker that was killed, so processes come from a pool class of ours, and its
thread pools, of which pathos keeps one for all programs' parts that ask for as many threads, get a private name.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from opero.concurrency.guest import multi_pool, thread_pool

__all__ = ["ThreadCrew"]

_numbers = itertools.count(1)


class ThreadCrew:
    """Threads of pathos' pool in a `MultiPool`, each running one endless function.

    They are daemons: they never keep the interpreter alive.

    Args:
        nodes: Threads.
        run: What each of them does from its first moment on, while others still begin.
    """

    def __init__(self, nodes: int, run: Callable[[], object]) -> None:
        self._id = f"opero-{next(_numbers)}"
        pool_class = functools.partial(thread_pool(), id=self._id, initializer=run)
        self._block = _multi_pool(pool_class, nodes)
        self._pool: Any = self._block.__enter__()

    def close(self) -> None:
        """End the pool; its functions must have been told to return, and are waited for."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._block.__exit__(None, None, None)

    def abandon(self) -> None:
        """Forget the pool while threads are still at work; they end with their functions."""
        pool, self._pool = self._pool, None
        if pool is not None:
            # `MultiPool` and pathos only know how to wait.
            pool.close()
            pool.__state__.pop(self._id, None)


def _multi_pool(pool_class: Any, nodes: int) -> AbstractContextManager[Any]:
    # `debug` off: switched on by an environment variable it would look for names that a function has not.
    block: AbstractContextManager[Any] = multi_pool()(
        pool_class=pool_class, nodes=nodes, debug=False
    )
    return block
