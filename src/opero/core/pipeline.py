# this_file: src/opero/core/pipeline.py
"""The fixed order of the stages, and what runs a call through them.

    deadline → cache → retry → fallback → concurrency → rate limit → circuit → invoke → timeout → function

This is the only module that knows all stages; everything that makes a function dependable (decorators, helpers, tasks)
builds a `Pipeline` and wraps it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from operator import attrgetter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.deadline import Deadline, current_deadline
from opero.core.failures import Report
from opero.core.function import Stats
from opero.core.invoke import AwaitableResult, Invoke
from opero.core.retry import Retry, RetryPolicy
from opero.core.stream import AsyncStream, Stream
from opero.errors import OperoUsageError, Rejected
from opero.events.bus import Emitter
from opero.utils import ambient
from opero.utils.ambient import Run, switch
from opero.utils.parameters import VAR_KEYWORD, stars, unwrap_partial
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.caching.handles import CacheHandle
    from opero.core.cache import CacheStage
    from opero.core.call import AsyncProceed, Call, Proceed, Stage
    from opero.core.circuit_breaker import Circuit
    from opero.core.concurrency_limit import Bulkhead
    from opero.core.decorated import Receipt
    from opero.core.fallback import ArgFallback
    from opero.core.function import FunctionInfo
    from opero.core.options import Options
    from opero.core.rate_limit import RateLimit
    from opero.core.timeout import Timeout


_STORE_OPTIONS = frozenset({
    "cache_backend", "cache_codec", "cache_copy", "cache_ignore", "cache_key", "cache_max_bytes",
    "cache_maxsize", "cache_namespace", "cache_version",
})  # fmt: skip
"""Options that decide what an entry is or where it lives: with one of them changed, a store cannot be shared."""


class FastPath:
    """Whether a wrapper's fast path is closed, so that every call goes through the stages."""

    __slots__ = ("closed",)

    def __init__(self, *, closed: bool) -> None:
        self.closed: bool = closed


class CallObserver:
    """One watched call.

    Args:
        call: The call; it gets a run.
        emitter: Where events of its start and end go.
    """

    __slots__ = ("_call", "_emitter", "_started")

    def __init__(self, call: Call, emitter: Emitter) -> None:
        self._call = call
        self._emitter = emitter
        self._started = False
        call.run = Run(emitter.function, started=ambient.clock().monotonic())

    def begin(self) -> None:
        """Make the call the current run, and emit once that it has started."""
        if self._call.run is not None:
            self._call.run.__enter__()
        if not self._started and self._emitter.wants(events.CallStarted):
            self._emitter.emit(events.CallStarted(function=self._emitter.function))
        self._started = True

    def pause(self) -> None:
        """The call goes on later, and maybe elsewhere: it is not the current run until the next `begin`."""
        if self._call.run is not None:
            self._call.run.__exit__(None, None, None)

    def end(self, error: BaseException | None = None) -> None:
        """Emit how the call has ended."""
        call = self._call
        if call.run is not None and self._emitter.wants(events.CallEnded):
            made = call.source == "fresh"
            self._emitter.emit(
                events.CallEnded(
                    # A coroutine that is closed ends in another context, where its run is not the current one.
                    run_id=call.run.id,
                    parent_id=call.run.parent_id,
                    source=call.source,
                    attempts=call.attempts if made else 0,
                    calls=call.calls,
                    # A stream that is dropped has not failed.
                    error=None if isinstance(error, GeneratorExit) else error,
                    seconds=call.elapsed() or 0.0,
                    slept=call.slept,
                    waited=call.waited,
                )
            )
        self.pause()


class Pipeline:
    """The stages around one function, linked once when it is decorated.

    Args:
        info: The function.
        options: What is switched on.
        origin: A pipeline of the same function whose limiter, store and counters are shared, as
            far as `changed` allows.
        changed: Names of the options in which this pipeline differs from its origin.

    Raises:
        OperoUsageError: The options do not fit the function.
    """

    def __init__(
        self,
        info: FunctionInfo,
        options: Options,
        *,
        origin: Pipeline | None = None,
        changed: frozenset[str] = frozenset(),
    ) -> None:
        _check(info, options)
        self.info = info
        self.options = options
        self.stats: Stats = origin.stats if origin else Stats()
        self.emitter: Emitter = Emitter(info.qualname, options.listeners, module=info.module)
        emitter = self.emitter
        policy = RetryPolicy.of(options)
        retries = bool(options.retries or options.stop)

        self.deadline: Deadline | None = (
            None
            if options.deadline is None
            else Deadline(
                parse_seconds(options.deadline, "deadline"),
                cuts=options.timeout is not None or info.kind in ("async", "async_generator"),
            )
        )
        self.cache: CacheStage | None = self._cache(origin, changed)
        if self.cache is not None:
            self.cache.connect(policy.retries_on, self.run)
        self.report: Report = Report(
            info, self.stats, emitter, retried=retries, needs_start=policy.stop is not None
        )
        self.retry: Retry = self._retry(policy if retries else None)
        self.fallback: ArgFallback | None = self._fallback(origin)
        self.rate_limit: RateLimit | None = self._rate_limit(origin, changed)
        self.concurrency: Bulkhead | None = self._concurrency(origin, changed)
        self.circuit: Circuit | None = self._circuit(origin, changed)
        self.retry.circuit = self.circuit
        if self.fallback is not None:
            self.fallback.circuit = self.circuit
        self.timeout: Timeout | None = self._limit("timeout")
        self.invoke: Invoke = Invoke(
            info.fn,
            self.stats,
            emitter,
            rejects=options.retry_if_result,
            label=self.fallback.label if self.fallback else None,
            timeout=self.timeout,
            idle_timeout=self._limit("idle_timeout"),
            stream=info.kind in ("generator", "async_generator"),
        )

        self.fast_path: FastPath = FastPath(closed=bool(emitter.listeners) or info.kind == "sync")
        self._listened = bool(emitter.listeners)
        self.awaits: bool = info.kind in ("async", "async_generator")
        self._arun: AsyncProceed | None = None
        if not self.awaits:
            self._run: Proceed = self.invoke.sync(
                probe=self._probed if info.kind == "sync" else None
            )
            for stage in reversed(self.stages):
                self._run = stage.wrap_sync(self._run)

    # --- stages ------------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that are switched on, outermost first."""
        return tuple(
            s for s in (self.deadline, self.cache, self.retry, *self._guards()) if s is not None
        )

    def _guards(self) -> tuple[Stage | None, ...]:
        """What lies between an attempt and the real call."""
        check = None
        if self.circuit is not None and (self.concurrency or self.rate_limit):
            from opero.core.circuit_breaker import CircuitCheck

            check = CircuitCheck(self.circuit)
        return (self.fallback, check, self.concurrency, self.rate_limit, self.circuit)

    def _retry(self, policy: RetryPolicy | None) -> Retry:
        options = self.options
        if options.retry_budget is not None:
            options.retry_budget.guards(self.info.module, self.info.qualname, "retry_budget")
        retry = Retry(policy, self.report, budget=options.retry_budget, nested=options.retry_nested)
        inner = getattr(unwrap_partial(self.info.fn), "__opero__", None)
        if inner is not None and inner.retry.policy is not None:
            retry.within[inner.info.name] = None
        return retry

    # These are loaded where they are asked for: most functions have none of them, and importing opero must stay cheap.

    def _fallback(self, origin: Pipeline | None) -> ArgFallback | None:
        if not self.options.arg_fallback:
            return None
        from opero.core.fallback import ArgFallback

        fallback = ArgFallback(self.info, self.options, self.stats, self.emitter)
        if origin and origin.fallback:
            fallback.cooldowns = origin.fallback.cooldowns
        return fallback

    def _rate_limit(self, origin: Pipeline | None, changed: frozenset[str]) -> RateLimit | None:
        if self.options.rate_limit is None:
            return None
        from opero.core.rate_limit import RateLimit

        shared = origin.rate_limit if origin and "rate_limit" not in changed else None
        limiter = shared.limiter if shared else self.options.rate_limit
        return RateLimit.of(limiter, self.info, self.options, self.stats, self.emitter)

    def _concurrency(self, origin: Pipeline | None, changed: frozenset[str]) -> Bulkhead | None:
        wanted = self.options.concurrency
        if wanted is None:
            return None
        from opero.core.concurrency_limit import Bulkhead
        from opero.limits.permits import ConcurrencyLimit

        shared = origin.concurrency if origin and "concurrency" not in changed else None
        limit = shared.limit if shared else wanted
        if not isinstance(limit, ConcurrencyLimit):
            limit = ConcurrencyLimit(limit)
        limit.guards(self.info.module, self.info.qualname, "concurrency")
        streams = self.info.kind == "async_generator"
        return Bulkhead(limit, self.stats, self.emitter, streams=streams)

    def _circuit(self, origin: Pipeline | None, changed: frozenset[str]) -> Circuit | None:
        wanted = self.options.circuit_breaker
        if not wanted:
            return None
        from opero.core.circuit_breaker import Circuit, breaker_of

        shared = origin.circuit if origin and "circuit_breaker" not in changed else None
        breaker = shared.breaker if shared else breaker_of(wanted)
        breaker.guards(self.info.module, self.info.qualname, "circuit_breaker")
        return Circuit(
            breaker,
            self.emitter,
            several=attrgetter("has_alternatives") if self.fallback else None,
            label=self.fallback.label if self.fallback else None,
        )

    def _limit(self, option: str) -> Timeout | None:
        seconds = getattr(self.options, option)
        if seconds is None:
            return None
        from opero.core.timeout import Timeout

        return Timeout(parse_seconds(seconds, option), self.emitter)

    def _cache(self, origin: Pipeline | None, changed: frozenset[str]) -> CacheStage | None:
        if not self.options.cache or self.info.kind in ("generator", "async_generator"):
            return None
        from opero.core.cache import CacheStage

        shared = origin.cache if origin and not changed & _STORE_OPTIONS else None
        return CacheStage(
            self.info, self.options, stats=self.stats, emitter=self.emitter, origin=shared
        )

    def _probed(self) -> None:
        """The first result of a plain function was no awaitable: from now on its fast path may be used."""
        self.fast_path.closed = self._listened

    @property
    def has_fast_path(self) -> bool:
        """Whether a wrapper may make the first call before any stage runs, because none has to look at it."""
        options, limit, cache = self.options, self.rate_limit, self.cache
        named = [p.name for p in self.info.calling if not stars(p)]
        return (
            (cache is None or (cache.leads_fast and (cache.in_memory or not self.awaits)))
            and (self.fallback is None or self.fallback.parameter.name in named)
            and options.retry_budget is None
            and options.retry_if_result is None
            and not self.report.needs_start
            and (limit is None or limit.limiter.direct)
            and self.info.kind in ("sync", "async")
            and (self.timeout is None or self.deadline is None or self.awaits)
        )

    @property
    def is_unguarded(self) -> bool:
        """Whether the fast path is nothing but the first call itself."""
        guards = (
            self.cache, self.fallback, self.deadline, self.circuit, self.concurrency, self.rate_limit,
            self.timeout,
        )  # fmt: skip
        return self.has_fast_path and not any(guards)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, call: Call) -> Any:
        """Run a call to its end and return its value; for an asynchronous function, a coroutine that does."""
        if switch.on and not (call.taped or call.flight) and (tape := ambient.tape()) is not None:
            return tape.take(self, call)
        if (switch.on or self._listened) and call.run is None and self.emitter.active:
            return self._observed(call)
        if self.awaits:
            return self._finish(call)
        if switch.on:
            call.deadline = current_deadline()
        try:
            return self._run(call)
        except Rejected as rejected:
            call.rejected = True
            return rejected.value
        except AwaitableResult as found:
            # A plain function that returns awaitables: its calls go on, and from now on begin, asynchronously.
            self.awaits = self.fast_path.closed = True
            call.prior_outcome, call.deadline = found.awaitable, None
            return self._finish(call)
        finally:
            if call.stream is not None:
                call.stream.at_end(lambda _: call.drop_failures())
            elif call.failures is not None:
                call.drop_failures()

    def _observed(self, call: Call) -> Any:
        """Run a call that has listeners."""
        observer = CallObserver(call, self.emitter)
        if self.awaits:
            return self._observed_finish(call, observer)
        observer.begin()
        try:
            value = self.run(call)
        except BaseException as error:
            observer.end(error)
            raise
        if isinstance(value, CoroutineType) and value.cr_code is Pipeline._finish.__code__:
            # A plain function that returns awaitables, and this one goes on asynchronously.
            observer.pause()
            return self._observed_finish(call, observer, value)
        if call.stream is not None:
            call.stream.at_end(observer.end)
            observer.pause()
        else:
            observer.end()
        return value

    async def _observed_finish(
        self, call: Call, observer: CallObserver, running: Coroutine[Any, Any, Any] | None = None
    ) -> Any:
        observer.begin()
        try:
            value = await (self._finish(call) if running is None else running)
        except BaseException as error:
            observer.end(error)
            raise
        observer.end()
        return value

    async def _finish(self, call: Call) -> Any:
        if self._arun is None:
            linked = self.invoke.asynchronous()
            for stage in reversed(self.stages):
                linked = stage.wrap_async(linked)
            self._arun = linked
        # Asked here, because a coroutine may begin elsewhere than where it was made.
        if switch.on:
            call.deadline = current_deadline()
        try:
            return await self._arun(call)
        except Rejected as rejected:
            call.rejected = True
            return rejected.value
        finally:
            if call.failures is not None:
                call.drop_failures()
            # Where another caller was quicker, what the function returned is not needed any more.
            if isinstance(call.prior_outcome, CoroutineType):
                call.take_prior_outcome().close()

    def limited_function(self) -> Callable[..., Any]:
        """Return the function for a fast path, with its limits of time around it where it can be cancelled."""
        timeout, deadline, fn = self.timeout, self.deadline, self.info.fn
        if self.info.kind != "async" or (timeout is None and deadline is None):
            return fn
        from opero.core.timeout import Timeout

        timeout = timeout or Timeout(None, self.emitter)
        return timeout.fast_path(fn, None if deadline is None else deadline.seconds)

    def cache_handle(self) -> CacheHandle:
        """Return what users get as `f.cache`."""
        from opero.caching.handles import CacheHandle

        return CacheHandle(self.cache, self._refresh)

    def _refresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from opero.core.cache import RefreshCall

        return self.run(RefreshCall(args, kwargs))

    def receipt(self, call: Call) -> Any:
        """Run a call and return its receipt; for an asynchronous function, a coroutine that does."""
        call.started = ambient.clock().monotonic()
        call.keep_failures = True
        try:
            value = self.run(call)
            return self._async_receipt(call, value) if self.awaits else self._receipt(call, value)
        finally:
            if not self.awaits:
                call.keep_failures = False
                if call.stream is None:
                    call.drop_failures()

    async def _async_receipt(self, call: Call, running: Coroutine[Any, Any, Any]) -> Receipt[Any]:
        if self.info.kind == "async_generator":
            stream = AsyncStream(running)
            await stream.send()
            return self._receipt(call, stream.iterate())
        try:
            return self._receipt(call, await running)
        finally:
            call.keep_failures = False
            call.drop_failures()

    def _receipt(self, call: Call, value: Any) -> Receipt[Any]:
        if self.fallback is not None:
            call.label = self.fallback.label(call)
        if isinstance(value, Stream):
            value = value.iterate()
        now = ambient.clock().monotonic()
        seconds = 0.0 if call.started is None else now - call.started
        remaining = None if call.deadline is None else max(0.0, call.deadline - now)
        return call.receipt(value, seconds, remaining)


def _check(info: FunctionInfo, options: Options) -> None:
    """Refuse what can never work, when the function is decorated."""
    if options.idle_timeout is not None and info.kind not in ("generator", "async_generator"):
        raise OperoUsageError(
            f"idle_timeout={options.idle_timeout!r}: {info.name}() is no generator and gives no items one after the "
            "other. Write timeout= for the limit of a call."
        )
    if info.kind in ("generator", "async_generator"):
        asked = sorted(name for name in options.given if name.startswith("cache"))
        if options.cache and asked:
            raise OperoUsageError(
                f"{asked[0]}={getattr(options, asked[0])!r}: {info.name}() is a generator, and what it yields is never "
                "cached. Leave the cache options out, or return a list."
            )
        if options.retry_if_result is not None:
            raise OperoUsageError(
                f"retry_if_result={options.retry_if_result!r}: {info.name}() is a generator and has no single result. "
                "Raise an error inside it instead."
            )
    takes_any = any(p.kind == VAR_KEYWORD for p in info.parameters)
    for option in ("secret", "cache_ignore"):
        for name in getattr(options, option):
            if not takes_any:
                info.require_parameter(name, option)
