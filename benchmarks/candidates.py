# this_file: benchmarks/candidates.py
"""How each library is put around a function: one builder per library and job.

Every builder imports its library itself, so that a missing one costs its own cells only. The
settings are what a user of that library would write for the job named by the builder, with equal
limits where the libraries let us choose them: three retries, 10,000 cache entries, an hour to
live, a rate that is never reached.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]

ATTEMPTS = 4
ENTRIES = 10_000
TTL = 3600
UNREACHED_RATE = 10**9


@dataclass(frozen=True, slots=True)
class Candidate:
    """One contender of a row.

    Attributes:
        name: As it stands in the table.
        requires: Top-level modules that must be installed.
        build: Wraps the row's function.
    """

    name: str
    requires: tuple[str, ...]
    build: Callable[[Function], Function]


def bare(function: Function) -> Function:
    """The function itself."""
    return function


# events: the function is the listener


def opero_emit(function: Function) -> Function:
    return _opero_emit(function, 1)


def opero_emit_to_ten(function: Function) -> Function:
    return _opero_emit(function, 10)


def opero_emit_to_nobody(function: Function) -> Function:
    from opero.events import CacheHit, EventBus

    bus, event = EventBus(), CacheHit(function="f")

    def emit(x: Any) -> Any:
        bus.emit(event)
        return function(x)

    return emit


def _opero_emit(function: Function, listeners: int) -> Function:
    from opero.events import CacheHit, EventBus

    bus, event = EventBus(), CacheHit(function="f")
    for _ in range(listeners):
        bus.subscribe(function)
    return lambda x: bus.emit(event)


def blinker_send(function: Function) -> Function:
    return _blinker_send(function, 1)


def blinker_send_to_ten(function: Function) -> Function:
    return _blinker_send(function, 10)


def _blinker_send(function: Function, receivers: int) -> Function:
    import blinker

    signal = blinker.Signal()
    # Receivers are distinguished by identity; each calls the function once.
    for _ in range(receivers):
        signal.connect(functools.partial(function), weak=False)

    def send(x: Any) -> Any:
        return signal.send(x)

    return send


# calls that are listened to


def opero_one_listener(function: Function) -> Function:
    from opero import opero

    return opero(cache=False, on_event=_ignore)(function)


def opero_ten_listeners(function: Function) -> Function:
    from opero import opero

    return opero(cache=False, on_event=[_ignore] * 10)(function)


def _ignore(event: Any) -> None:
    pass


# orchestrators


def opero_two_retries(function: Function) -> Function:
    from opero import opero

    return opero(cache=False, retries=2)(function)


def _config(**more: Any) -> Any:
    from opero import OrchestratorConfig, RetryConfig

    retry = RetryConfig(max_attempts=3, wait_min=0, wait_multiplier=0)
    return OrchestratorConfig(retry_config=retry, **more)


def orchestrated(function: Function) -> Function:
    from opero import orchestrate

    made: Function = orchestrate(config=_config())(function)
    return made


def orchestrator_sync(function: Function) -> Function:
    from opero import Orchestrator

    return functools.partial(Orchestrator(_config()).execute_sync, function)


def orchestrator_async(function: Function) -> Function:
    from opero import Orchestrator

    return functools.partial(Orchestrator(_config()).execute, function)


def orchestrator_fallback(function: Function) -> Function:
    """Has a fallback that is never needed."""
    from opero import Orchestrator

    return functools.partial(Orchestrator(_config(fallbacks=[function])).execute, function)


# retry


def opero_retry(function: Function) -> Function:
    from opero import opero

    return opero(cache=False)(function)


def nopanic_retry(function: Function) -> Function:
    import nopanic

    return nopanic.retry(attempts=ATTEMPTS)(function)


def pyresilience_retry(function: Function) -> Function:
    from pyresilience import RetryConfig, resilient

    decorated: Function = resilient(retry=RetryConfig(max_attempts=ATTEMPTS))(function)
    return decorated


def stamina_retry(function: Function) -> Function:
    import stamina

    return stamina.retry(on=Exception, attempts=ATTEMPTS)(function)


def tenacity_retry(function: Function) -> Function:
    import tenacity

    return tenacity.retry(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(),
        reraise=True,
    )(function)


# retry without pauses


def opero_retry_at_once(function: Function) -> Function:
    from opero import opero

    return opero(cache=False, min_delay=0, max_delay=0)(function)


def nopanic_retry_at_once(function: Function) -> Function:
    import nopanic

    return nopanic.retry(attempts=ATTEMPTS, backoff=0)(function)


def pyresilience_retry_at_once(function: Function) -> Function:
    from pyresilience import RetryConfig, resilient

    config = RetryConfig(max_attempts=ATTEMPTS, delay=0, jitter=False)
    decorated: Function = resilient(retry=config)(function)
    return decorated


def stamina_retry_at_once(function: Function) -> Function:
    import stamina

    # Its default hook logs every retry, which no other contender does.
    stamina.instrumentation.set_on_retry_hooks([])
    return stamina.retry(
        on=Exception, attempts=ATTEMPTS, wait_initial=0, wait_max=0, wait_jitter=0
    )(function)


def tenacity_retry_without_sleep(function: Function) -> Function:
    import tenacity

    async def no_sleep_async(_seconds: float) -> None:
        return None

    def no_sleep(_seconds: float) -> None:
        return None

    return tenacity.retry(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_none(),
        sleep=no_sleep_async if inspect.iscoroutinefunction(function) else no_sleep,
        reraise=True,
    )(function)


# cache


def opero_cache(function: Function) -> Function:
    from opero import opero

    return opero(retries=0)(function)


def opero_cache_of_text(function: Function) -> Function:
    """What an isolated dict is compared with: the hit of a value that needs no copy."""
    return opero_cache(lambda x: str(function(x)))


def cachebox_ttl(function: Function) -> Function:
    import cachebox

    return cachebox.cached(cachebox.TTLCache(ENTRIES, TTL))(function)


def cachebox_lru(function: Function) -> Function:
    import cachebox

    return cachebox.cached(cachebox.LRUCache(ENTRIES))(function)


def cachebox_deepcopy(function: Function) -> Function:
    import cachebox

    return cachebox.cached(
        cachebox.TTLCache(ENTRIES, TTL), postprocess=cachebox.postprocess_deepcopy
    )(function)


def cachetools_ttl(function: Function) -> Function:
    import cachetools

    cache: Any = cachetools.TTLCache(ENTRIES, TTL)
    decorated: Function = cachetools.cached(cache, lock=threading.RLock())(function)
    return decorated


def functools_lru(function: Function) -> Function:
    return functools.lru_cache(ENTRIES)(function)


def functools_lru_deepcopy(function: Function) -> Function:
    cached = functools.lru_cache(ENTRIES)(function)
    return lambda x: copy.deepcopy(cached(x))


def functools_lru_pickle(function: Function) -> Function:
    @functools.lru_cache(ENTRIES)
    def cached(x: Any) -> bytes:
        return pickle.dumps(function(x), pickle.HIGHEST_PROTOCOL)

    return lambda x: pickle.loads(cached(x))  # noqa: S301 - bytes made one line above


def pickle_round_trip(function: Function) -> Function:
    value = function(1)

    def round_trip(_: Any) -> Any:
        return pickle.loads(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))  # noqa: S301 - own bytes

    return round_trip


def deepcopy_alone(function: Function) -> Function:
    value = function(1)
    return lambda _: copy.deepcopy(value)


def async_lru_ttl(function: Function) -> Function:
    import async_lru

    return async_lru.alru_cache(maxsize=ENTRIES, ttl=TTL)(function)


def nopanic_cache(function: Function) -> Function:
    import nopanic

    return nopanic.cache(TTL, maxsize=ENTRIES)(function)


def pyresilience_cache(function: Function) -> Function:
    from pyresilience import CacheConfig, resilient

    decorated: Function = resilient(cache=CacheConfig(max_size=ENTRIES, ttl=TTL))(function)
    return decorated


# limiter


def opero_limit(function: Function) -> Function:
    from opero import opero

    return opero(cache=False, retries=0, rate_limit=UNREACHED_RATE)(function)


def nopanic_limit(function: Function) -> Function:
    import nopanic

    return nopanic.rate_limit(UNREACHED_RATE)(function)


def pyresilience_limit(function: Function) -> Function:
    from pyresilience import RateLimiterConfig, resilient

    config = RateLimiterConfig(max_calls=UNREACHED_RATE, period=1.0, max_wait=60)
    decorated: Function = resilient(rate_limiter=config)(function)
    return decorated


def asynciolimiter_limit(function: Function) -> Function:
    """Spaces its callers: each one after the first waits for a turn of the loop."""
    from asynciolimiter import Limiter

    return _waits_first(Limiter(UNREACHED_RATE).wait, function)


def asynciolimiter_bucket(function: Function) -> Function:
    """Lets callers through while the bucket has room, without looking at the clock."""
    from asynciolimiter import LeakyBucketLimiter

    return _waits_first(LeakyBucketLimiter(UNREACHED_RATE, capacity=UNREACHED_RATE).wait, function)


def aiolimiter_limit(function: Function) -> Function:
    from aiolimiter import AsyncLimiter

    return _waits_first(AsyncLimiter(UNREACHED_RATE, 1).acquire, function)


def _waits_first(wait: Function, function: Function) -> Function:
    async def limited(*args: Any) -> Any:
        await wait()
        return await function(*args)

    return limited


def pyrate_limit(function: Function) -> Function:
    from pyrate_limiter import Duration, Limiter, Rate

    limiter = Limiter(Rate(UNREACHED_RATE, Duration.SECOND))
    if inspect.iscoroutinefunction(function):
        return _waits_first(limiter.try_acquire_async, function)

    def limited(*args: Any) -> Any:
        limiter.try_acquire()
        return function(*args)

    return limited


# everything at once


def opero_stack(function: Function) -> Function:
    from opero import opero

    return opero(arg_fallback="model", rate_limit=UNREACHED_RATE)(function)


def nopanic_stack(function: Function) -> Function:
    import nopanic

    limited = nopanic.rate_limit(UNREACHED_RATE)(function)
    retried = nopanic.retry(attempts=ATTEMPTS)(limited)
    return nopanic.cache(TTL, maxsize=ENTRIES)(retried)


def pyresilience_stack(function: Function) -> Function:
    from pyresilience import CacheConfig, RateLimiterConfig, RetryConfig, resilient

    decorated: Function = resilient(
        cache=CacheConfig(max_size=ENTRIES, ttl=TTL),
        retry=RetryConfig(max_attempts=ATTEMPTS),
        rate_limiter=RateLimiterConfig(max_calls=UNREACHED_RATE, period=1.0, max_wait=60),
    )(function)
    return decorated


def hand_stack(function: Function) -> Function:
    """Made of cachetools around tenacity around pyrate-limiter."""
    return cachetools_ttl(tenacity_retry(pyrate_limit(function)))


def hand_stack_async(function: Function) -> Function:
    """Made of async-lru around tenacity around aiolimiter."""
    return async_lru_ttl(tenacity_retry(aiolimiter_limit(function)))
