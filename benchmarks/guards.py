# this_file: benchmarks/guards.py
"""How each library puts a guard around a function, one at a time and all together.

Limits are such that nothing is ever refused, delayed or cut short: what is measured is the way to
a call that succeeds. Retries are off, except in the stacks.
"""

from __future__ import annotations

import inspect
from typing import Any

from benchmarks.candidates import ATTEMPTS, UNREACHED_RATE, Candidate, Function

SECONDS = 30
CALLS = 100


def _opero(function: Function, **options: Any) -> Function:
    from opero import opero

    decorated: Function = opero(**{"cache": False, "retries": 0, **options})(function)
    return decorated


def opero_breaker(function: Function) -> Function:
    return _opero(function, circuit_breaker=True)


def opero_bulkhead(function: Function) -> Function:
    return _opero(function, concurrency=CALLS)


def opero_timeout(function: Function) -> Function:
    return _opero(function, timeout=SECONDS)


def opero_deadline(function: Function) -> Function:
    return _opero(function, deadline=SECONDS)


def opero_guards(function: Function) -> Function:
    return _opero(
        function,
        retries=ATTEMPTS - 1,
        concurrency=CALLS,
        rate_limit=UNREACHED_RATE,
        circuit_breaker=True,
        timeout=SECONDS,
    )


def nopanic_breaker(function: Function) -> Function:
    import nopanic

    return nopanic.circuit_breaker()(function)


def nopanic_bulkhead(function: Function) -> Function:
    import nopanic

    return nopanic.bulkhead(CALLS)(function)


def nopanic_timeout(function: Function) -> Function:
    import nopanic

    return nopanic.timeout(SECONDS)(function)


def nopanic_deadline(function: Function) -> Function:
    """Has deadlines for blocks only; a retry looks at them, and what cuts a call short is a timeout."""
    import nopanic

    retried = nopanic.retry(attempts=ATTEMPTS)(function)
    if inspect.iscoroutinefunction(function):
        retried = nopanic.timeout(SECONDS)(retried)

        async def within_async(*args: Any) -> Any:
            with nopanic.deadline(SECONDS):
                return await retried(*args)

        return within_async

    def within(*args: Any) -> Any:
        with nopanic.deadline(SECONDS):
            return retried(*args)

    return within


def nopanic_guards(function: Function) -> Function:
    import nopanic

    guarded = nopanic.circuit_breaker()(nopanic.timeout(SECONDS)(function))
    limited = nopanic.bulkhead(CALLS)(nopanic.rate_limit(UNREACHED_RATE)(guarded))
    return nopanic.retry(attempts=ATTEMPTS)(limited)


def _pyresilience(function: Function, **configs: Any) -> Function:
    from pyresilience import resilient

    decorated: Function = resilient(**configs)(function)
    return decorated


def pyresilience_breaker(function: Function) -> Function:
    from pyresilience import CircuitBreakerConfig

    return _pyresilience(function, circuit_breaker=CircuitBreakerConfig())


def pyresilience_bulkhead(function: Function) -> Function:
    from pyresilience import BulkheadConfig

    return _pyresilience(function, bulkhead=BulkheadConfig(max_concurrent=CALLS))


def pyresilience_timeout(function: Function) -> Function:
    from pyresilience import TimeoutConfig

    return _pyresilience(function, timeout=TimeoutConfig(seconds=SECONDS))


def pyresilience_deadline(function: Function) -> Function:
    """The nearest thing that it has: a timeout of the call with all its attempts."""
    from pyresilience import RetryConfig, TimeoutConfig

    return _pyresilience(
        function,
        retry=RetryConfig(max_attempts=ATTEMPTS),
        timeout=TimeoutConfig(seconds=SECONDS, per_attempt=False),
    )


def pyresilience_guards(function: Function) -> Function:
    import pyresilience as p

    return _pyresilience(
        function,
        retry=p.RetryConfig(max_attempts=ATTEMPTS),
        bulkhead=p.BulkheadConfig(max_concurrent=CALLS),
        rate_limiter=p.RateLimiterConfig(max_calls=UNREACHED_RATE, period=1.0, max_wait=60),
        circuit_breaker=p.CircuitBreakerConfig(),
        timeout=p.TimeoutConfig(seconds=SECONDS),
    )


def _row(word: str, opero: Any, nopanic: Any, pyresilience: Any) -> tuple[Candidate, ...]:
    return (
        Candidate("opero", ("opero",), opero),
        Candidate(f"nopanic {word}", ("nopanic",), nopanic),
        Candidate(f"pyresilience {word}", ("pyresilience",), pyresilience),
    )


GUARDS: dict[str, tuple[str, tuple[Candidate, ...]]] = {
    "breaker": (
        "circuit breaker",
        _row("breaker", opero_breaker, nopanic_breaker, pyresilience_breaker),
    ),
    "bulkhead": (
        "concurrency limit",
        _row("bulkhead", opero_bulkhead, nopanic_bulkhead, pyresilience_bulkhead),
    ),
    "timeout": ("timeout", _row("timeout", opero_timeout, nopanic_timeout, pyresilience_timeout)),
    "deadline": (
        "deadline",
        _row("deadline", opero_deadline, nopanic_deadline, pyresilience_deadline),
    ),
    "stack": (
        "retry, concurrency, rate, breaker, timeout together",
        _row("stack", opero_guards, nopanic_guards, pyresilience_guards),
    ),
}
"""Slug, words and contenders of each guard."""
