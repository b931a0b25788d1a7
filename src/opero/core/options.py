# this_file: src/opero/core/options.py
"""Declare every option once: name, default, meaning and check."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, dataclass_transform

import opero.utils.checks as checks
from opero.errors import FailureFilter, OperoUsageError, RetryFilter
from opero.utils.lazy import NamedTuple
from opero.utils.secrets import masked_repr
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    import inspect
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager

    from opero.caching.codec import Codec
    from opero.caching.memory import Store
    from opero.core.retry_budget import RetryBudget
    from opero.events import Event
    from opero.limits.breaker import CircuitBreaker
    from opero.limits.limiter import RateLimiter
    from opero.limits.permits import ConcurrencyLimit
    from opero.utils.checks import Check
    from opero.utils.units import Duration


StageName = Literal["cache", "retry", "fallback", "rate limit", "guard", "map", "any"]
"""The stage that an option belongs to; "any" for those that concern the function as a whole."""


_ALSO_STANDALONE: dict[StageName, frozenset[str]] = {
    "map": frozenset({"timeout"}),
    "rate limit": frozenset({"retry_after_max"}),
}
"""Options of another stage that mean something to a stage which stands alone."""


class Option(NamedTuple):
    """How one option is declared.

    Attributes:
        stage: The stage that it belongs to.
        default: Its default.
        check: Raises if a value cannot be meant.
    """

    stage: StageName
    default: Any
    check: Check


def option(stage: StageName, default: Any, check: Check) -> Any:
    """Declare one option; to type checkers it is the default of a field."""
    return Option(stage, default, check)


class _OptionsSignature:
    """The signature of a class of options, made when it is asked for."""

    def __get__(self, instance: object, owner: type[_Declared]) -> inspect.Signature:
        from inspect import Parameter, Signature, get_annotations

        hints = {
            name: hint for each in owner.__mro__ for name, hint in get_annotations(each).items()
        }
        return Signature(
            [
                Parameter(name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[name])
                for name, one in owner.declared.items()
            ]
        )


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _Declared:
    """Values of declared options: a frozen dataclass, but for the methods that `dataclasses` compiles for each class.

    These took longer than all else that is done when opero is imported.

    Attributes:
        declared: All options by name, in the order of their declaration.
        given: Names of the options that were given, as against those left at their default.
    """

    declared: ClassVar[Mapping[str, Option]] = {}
    __signature__: ClassVar[Any] = _OptionsSignature()
    given: frozenset[str]

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Option)}
        cls.declared = {**cls.declared, **own}
        for name, one in own.items():
            setattr(cls, name, one.default)

    def __init__(self, **values: Any) -> None:
        checks.names(type(self).__name__, values, self.declared)
        for name, value in values.items():
            checks.apply(self.declared[name].check, name, value)
        vars(self).update(values, given=frozenset(values))
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check how the values fit each other."""

    def with_values(self, **values: Any) -> Self:
        """Return a copy with other values, which are neither checked nor noted as given."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self), **values)
        return copied

    def __setattr__(self, name: str, value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().values()))

    def as_dict(self) -> dict[str, Any]:
        """Return all values by name."""
        return {name: getattr(self, name) for name in self.declared}

    def __repr__(self) -> str:
        # Fields of the caches and names may hold addresses with passwords.
        shown = ", ".join(f"{name}={masked_repr(v)}" for name, v in self.as_dict().items())
        return f"{type(self).__name__}({shown})"


# --- checks of single options ---------------------------------------------------------------------

_version: Check = checks.must_be(
    'text, a whole number or None, for example "2"',
    lambda value: value is None or isinstance(value, str) or checks.is_whole(value, -math.inf),
)
_share: Check = checks.must_be(
    "a number between 0 and 1, such as 0.8",
    lambda value: value is None or (checks.is_number(value) and 0 < value < 1),
)
_handlers: Check = checks.none_or(
    checks.must_be(
        "a callable that gets the event, or a list of them",
        lambda value: all(map(callable, value if isinstance(value, list | tuple) else [value])),
    )
)
_budget: Check = checks.none_or(
    checks.must_be(
        "a RetryBudget, for example RetryBudget(ratio=0.1), or None",
        checks.has("deposit", "withdraw"),
        instance=True,
    )
)
_breaker: Check = checks.must_be(
    "True or a CircuitBreaker; None means without",
    lambda value: isinstance(value, bool | None) or checks.has("acquire", "force_open")(value),
    instance=True,
)


def _concurrency(name: str, value: Any) -> None:
    """A whole number of calls, a shared limit or None."""
    if not checks.is_limit(name, value, "release", "try_acquire"):
        checks.whole(1)(name, value)


def _strategy(name: str, value: Any) -> None:
    """A tenacity strategy or a callable like it; the class instead of an instance is a trap."""
    checks.callable_or_none(name, value)
    checks.refuse_class(name, value)


def _names(name: str, value: Any) -> None:
    """Several names; a bare str is the classic trap."""
    if isinstance(value, str):
        raise OperoUsageError(f"{name}={value!r} must be several names: write {name}=({value!r},).")
    if not isinstance(value, list | tuple | set | frozenset) or not all(
        isinstance(n, str) for n in value
    ):
        raise OperoUsageError(
            f'{name}={value!r} must be a tuple or list of parameter names, like ("client",).'
        )


def _retry_filter(name: str, value: Any) -> None:
    """What `failure_filter` takes, "default" or "transient"."""
    if isinstance(value, str):
        checks.one_of("default", "transient")(name, value)
    else:
        checks.failure_filter(name, value)


_progress: Check = checks.must_be(
    'True, False or "rich"', lambda value: isinstance(value, bool) or value == "rich"
)
_chunks: Check = checks.must_be(
    '"auto" or a whole number, 1 or more',
    lambda value: value == "auto" or checks.is_whole(value, 1),
)
_error_bound: Check = checks.must_be(
    "a whole number of items, 1 or more, or a share of them between 0 and 1, such as 0.1",
    lambda value: (
        value is None or checks.is_whole(value, 1) or (isinstance(value, float) and 0 < value < 1)
    ),
)
_executor: Check = checks.must_be(
    "an executor with submit(), a function that makes one, or a pool of twat-mp; None means by mode=",
    lambda value: (
        value is None
        or callable(value)
        or any(hasattr(value, name) for name in ("submit", "apipe", "pool_class"))
    ),
    instance=True,
)
_token: Check = checks.none_or(
    checks.must_be(
        "an object with is_set(), such as threading.Event(), or None",
        checks.has("is_set"),
        instance=True,
    )
)
_error_types: Check = checks.must_be(
    "an exception type or a tuple of them, for example (RateLimitPausedError, SpendCapError)",
    checks.are_errors,
)


# --- options of calls -----------------------------------------------------------------------------


class Options(_Declared):
    """The options of `@opero`, as given, checked when they are made.

    Attributes:
        cache: Cache results.
        cache_ttl: Lifetime of an entry; None never expires.
        cache_backend: "memory", "disk", "disk:PATH", "redis", "redis://…", or a store object.
        cache_key: Callable that gets the call's arguments and returns the key.
        cache_namespace: Prefix shared by functions, cleared together.
        cache_maxsize: Most entries a function keeps in memory.
        cache_max_bytes: Most bytes a function's entries take in memory; on disk, all entries of the folder.
        cache_if: `(result, receipt) -> bool or ttl`: refuse to store, or shorten the lifetime.
        cache_copy: Isolate mutable values; False shares one object.
        cache_codec: How disk and redis encode: "auto", "plain" (no pickles), or an object with encode and
            decode.
        cache_ignore: Parameter names left out of the key.
        cache_version: Part of the key: change it to start afresh.
        cache_stale_ttl: How long an expired entry may still be served when the call fails.
        cache_refresh: Refresh in the background when an entry is older than this share (0..1) of its ttl.
        retries: Calls made after the first one failed: 1 + 3.
        backoff_factor: Growth of the pause from one retry to the next.
        min_delay: Shortest pause before a retry.
        max_delay: Longest pause before a retry.
        jitter: Draw each pause at random; False: always the same pauses.
        retry_on: Type, tuple of types, or predicate: exactly that; not given: every Exception but what a
            service has answered for good; "transient": only what is known to pass.
        retry_if_result: Predicate on each call's result: a rejected one moves on like a failure.
        wait: Tenacity strategy that replaces the pauses.
        stop: Tenacity strategy that replaces the end.
        deadline: Budget of the whole call, waits included.
        retry_after_max: Longest pause that is made because the service asks for it; beyond it the call fails at
            once.
        retry_budget: A `RetryBudget` shared by functions: retries as a share of calls.
        retry_nested: False: what another opero function within has retried in vain is not retried again.
        arg_fallback: Name of the parameter whose list or tuple holds the values to try in order.
        fallback_on: What moves on to the next value.
        rate_limit: Calls per second, "100/minute", "10/s & 500/minute", or a shared `RateLimiter`.
        circuit_breaker: True, or a (shared) `CircuitBreaker`.
        concurrency: Most calls in flight at once, or a shared `ConcurrencyLimit`.
        timeout: Limit for each real call.
        idle_timeout: Limit between two items of a stream, where it shall differ from `timeout`.
        secret: Parameter names never shown.
        on_event: Listener(s) for this function.

    Raises:
        OperoUsageError: A value or a combination cannot work; the message names the option, the
            value and the fix.
    """

    cache: bool = option("cache", True, checks.boolean)
    cache_ttl: Duration | None = option("cache", 3600, checks.duration_or_none)
    cache_backend: str | Store = option("cache", "memory", checks.store)
    cache_key: Callable[..., object] | None = option("cache", None, checks.callable_or_none)
    cache_namespace: str = option("cache", "opero", checks.text)
    cache_maxsize: int = option("cache", 10_000, checks.whole(1))
    cache_max_bytes: int | str = option("cache", 256_000_000, checks.size)
    cache_if: Callable[[Any, Any], object] | None = option("cache", None, checks.callable_or_none)
    cache_copy: bool = option("cache", True, checks.boolean)
    cache_codec: str | Codec = option("cache", "auto", checks.codec)
    cache_ignore: Iterable[str] = option("cache", (), _names)
    cache_version: str | int | None = option("cache", None, _version)
    cache_stale_ttl: Duration | None = option("cache", None, checks.duration_or_none)
    cache_refresh: float | None = option("cache", None, _share)
    retries: int = option("retry", 3, checks.whole(0))
    backoff_factor: float = option("retry", 1.5, checks.factor)
    min_delay: Duration = option("retry", 0.1, checks.duration)
    max_delay: Duration = option("retry", 30, checks.duration)
    jitter: bool = option("retry", True, checks.boolean)
    retry_on: RetryFilter = option("retry", "default", _retry_filter)
    retry_if_result: Callable[[Any], object] | None = option("retry", None, checks.callable_or_none)
    wait: Callable[..., Any] | None = option("retry", None, _strategy)
    stop: Callable[..., Any] | None = option("retry", None, _strategy)
    deadline: Duration | None = option("any", None, checks.duration_or_none)
    retry_after_max: Duration = option("retry", 60, checks.duration)
    retry_budget: RetryBudget | None = option("retry", None, _budget)
    retry_nested: bool = option("retry", True, checks.boolean)
    arg_fallback: str | None = option("fallback", None, checks.text_or_none)
    fallback_on: FailureFilter = option("fallback", Exception, checks.failure_filter)
    rate_limit: float | str | RateLimiter | None = option("rate limit", None, checks.rate)
    circuit_breaker: bool | CircuitBreaker | None = option("guard", None, _breaker)
    concurrency: int | ConcurrencyLimit | None = option("guard", None, _concurrency)
    timeout: Duration | None = option("guard", None, checks.duration_or_none)
    idle_timeout: Duration | None = option("guard", None, checks.duration_or_none)
    secret: Iterable[str] = option("any", (), _names)
    on_event: Callable[[Event], object] | Iterable[Callable[[Event], object]] | None = option(
        "any", None, _handlers
    )

    def __post_init__(self) -> None:
        if parse_seconds(self.min_delay, "min_delay") > parse_seconds(self.max_delay, "max_delay"):
            raise OperoUsageError(
                f"min_delay={self.min_delay!r} is longer than max_delay={self.max_delay!r}: "
                "raise max_delay or lower min_delay."
            )

        for name in ("cache_stale_ttl", "cache_refresh"):
            if self.cache_ttl is None and getattr(self, name) is not None:
                raise OperoUsageError(
                    f"{name}={getattr(self, name)!r} needs entries that expire: "
                    "give a cache_ttl other than None, or leave it out."
                )

    @property
    def listeners(self) -> tuple[Callable[[Event], object], ...]:
        """The listeners of `on_event`, one or several."""
        given = self.on_event
        return () if given is None else (given,) if callable(given) else tuple(given)

    @classmethod
    def of(cls, by: str, /, **given: Any) -> Self:
        """Make options.

        Args:
            by: Name of the decorator, for the message: "opero".
            given: Options by name.

        Raises:
            OperoUsageError: An unknown name (with the nearest known one) or a wrong value.
        """
        checks.names(by, given, cls.declared)
        return cls(**given)

    @classmethod
    def for_stage(cls, by: str, stage: StageName, /, **given: Any) -> Self:
        """Make options with one stage on and all others off.

        Args:
            by: Name of the decorator, for the message.
            stage: The stage whose options may be given.
            given: Its options, and those that belong to any stage.

        Raises:
            OperoUsageError: An option of another stage, an unknown name or a wrong value.
        """
        own = {name for name, one in cls.declared.items() if one.stage in (stage, "any")}
        allowed = own | _ALSO_STANDALONE.get(stage, frozenset())
        checks.names(by, given, allowed, f" Its options: {', '.join(sorted(allowed))}.")
        off: dict[str, Any] = {"cache": stage == "cache"}
        if stage != "retry":
            off["retries"] = 0
        return cls.of(by, **{**off, **given})

    def replace(self, by: str, /, **changes: Any) -> Self:
        """Return these options with some changed; both sets of given names are remembered."""
        kept = {name: getattr(self, name) for name in self.given}
        return type(self).of(by, **{**kept, **changes})


MODES = ("auto", "process", "thread", "async", "async_process")
"""The modes of a map."""


class StopToken(Protocol):
    """Stops a map: a `threading.Event`, an `asyncio.Event`, or anything else with `is_set`."""

    def is_set(self) -> bool:
        """Whether the map shall begin no further item."""
        ...


class MapOptions(Options):
    """The options of `@operomap` beside those of `@opero`, as given, checked when they are made.

    Attributes:
        mode: Where items run: "process" (auto for a `def`), "thread", "async" (auto for an `async def`),
            "async_process".
        workers: Processes, threads, or coroutines in flight.
        ordered: Results in the order of the input, or as they come.
        progress: Progress bar on stderr; silent where there is no terminal or notebook.
        on_error: "raise" the first failing item's own error at once, "return" the exception in its place, or
            "skip" the item.
        max_errors: Stop the map after this many failed items, or this share of them.
        chunksize: Items per dispatch.
        executor: Any `concurrent.futures.Executor`, a function that makes one, or a pool of twat-mp.
        sequential: Run inline, for debugging with real stack traces.
        item_key: What an item is in the checkpoint; None: the item itself.
        checkpoint: File of results that a later run takes up; journal of the map.
        worker_init: Called once in each new worker process.
        max_tasks_per_worker: Items after which a worker process is replaced.
        memory_limit: Most bytes that a worker process may take, such as "2GB".
        start_method: How worker processes begin: "fork", "forkserver" or "spawn"; None: as set in
            `multiprocessing`, else "forkserver".
        on_result: Called with each finished item: an `ItemResult`.
        stop_token: A `threading.Event` or its like: when it is set, the map ends with what is done.
        stop_on: Error types that end the map with what is done.

    Raises:
        OperoUsageError: A value or a combination cannot work; the message names the option, the
            value and the fix.
    """

    mode: Literal["auto", "process", "thread", "async", "async_process"] = option(
        "map", "auto", checks.one_of(*MODES)
    )
    workers: int = option("map", 4, checks.whole(1))
    ordered: bool = option("map", True, checks.boolean)
    progress: bool | Literal["rich"] = option("map", True, _progress)
    on_error: Literal["raise", "return", "skip"] = option(
        "map", "raise", checks.one_of("raise", "return", "skip")
    )
    max_errors: int | float | None = option("map", None, _error_bound)
    chunksize: int | Literal["auto"] = option("map", "auto", _chunks)
    executor: Executor | AbstractContextManager[Any] | Callable[[], Any] | None = option(
        "map", None, _executor
    )
    sequential: bool = option("map", False, checks.boolean)
    item_key: Callable[[Any], object] | None = option("map", None, checks.callable_or_none)
    checkpoint: str | os.PathLike[str] | None = option("map", None, checks.none_or(checks.path))
    worker_init: Callable[[], object] | None = option("map", None, checks.callable_or_none)
    max_tasks_per_worker: int | None = option("map", None, checks.none_or(checks.whole(1)))
    memory_limit: int | str | None = option("map", None, checks.none_or(checks.size))
    start_method: Literal["fork", "forkserver", "spawn"] | None = option(
        "map", None, checks.none_or(checks.one_of("fork", "forkserver", "spawn"))
    )
    on_result: Callable[[Any], object] | None = option("map", None, checks.callable_or_none)
    stop_token: StopToken | None = option("map", None, _token)
    stop_on: type[BaseException] | tuple[type[BaseException], ...] = option("map", (), _error_types)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.executor is not None and self.mode != "auto":
            raise OperoUsageError(
                f"executor={self.executor!r} says where items run, and so does mode={self.mode!r}: leave one out."
            )
        if self.item_key is not None and self.checkpoint is None:
            raise OperoUsageError(
                f"item_key={self.item_key!r} says what an item is in the checkpoint: give "
                'checkpoint="run.db" as well, or leave it out.'
            )


def standalone(by: str, stage: StageName, /, **options: Any) -> Any:
    """Return a decorator with one stage on and all others off.

    Each stage's module builds its `get_…_decorator` with it.

    Args:
        by: Name of the decorator, for messages.
        stage: The stage whose options may be given.
        options: Options by name.

    Raises:
        OperoUsageError: An option of another stage, an unknown name or a wrong value.
    """
    made = Options.for_stage(by, stage, **options)

    def decorate(function: Any) -> Any:
        # Found by name: it knows every stage, and no stage may import it in turn.
        return import_module("opero.core.decorate").decorate(function, made, by=by)

    return decorate
