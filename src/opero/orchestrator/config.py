# this_file: src/opero/orchestrator/config.py
"""Configure an `Orchestrator`: objects that are checked when made or changed, and turned into options of `@opero`."""

# ruff: noqa: RUF009 - what `_checked` and `_part` return is a field of its own for each class

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from opero.core.options import Options
from opero.core.retry import grown
from opero.errors import OperoUsageError, did_you_mean
from opero.utils import checks
from opero.utils.secrets import masked_repr
from opero.utils.units import Duration, parse_seconds

if TYPE_CHECKING:
    from opero.events.messages import EventLogger  # noqa: TC004 - the annotation is not evaluated


Backend = Literal["pathos", "multiprocessing", "process", "aiomultiprocess"]
"""Known names for worker processes; all of them mean opero's own."""


class Configuration:
    """Base of the configurations: a change is checked like a new object.

    Fields are dataclass fields; `metadata` names the check of one.
    """

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(cast("Any", self)):
            if (check := declared.metadata.get("check")) is not None:
                checks.apply(check, declared.name, getattr(self, declared.name))

    def __setattr__(self, name: str, value: object) -> None:
        known = [f.name for f in dataclasses.fields(cast("Any", self))]
        if name not in known:
            raise OperoUsageError(
                f"{type(self).__name__} has no {name!r}.{did_you_mean(name, known)}"
            )
        if known[-1] in vars(self):  # it is complete
            value = getattr(dataclasses.replace(cast("Any", self), **{name: value}), name)
        object.__setattr__(self, name, value)


def _checked(default: Any, check: checks.Check) -> Any:
    """Declare a field that is checked so; to type checkers it is the default."""
    return field(default=default, metadata={"check": check})


def _part(kind: type) -> Any:
    """Declare a field that is another configuration, or None."""
    wanted = f"a {kind.__name__}: write {kind.__name__}(...)"
    return _checked(None, checks.none_or(checks.must_be(wanted, lambda v: isinstance(v, kind))))


_seconds: Final = checks.must_be(
    "a number of seconds, 0 or more", lambda v: type(v) in (int, float) and 0 <= v < math.inf
)
_options: Final = checks.must_be(
    "a dict of options of @opero, such as {'timeout': 5}", lambda value: isinstance(value, Mapping)
)


@dataclass(frozen=True, slots=True)
class _ExponentialWait:
    """tenacity's `wait_exponential`: min(high, multiplier · 2^(n-1)), and at least low, before retry n.

    Attributes:
        multiplier: Seconds before the first retry; it is no growth factor, each pause is twice the one before.
        low, high: Shortest and longest pause in seconds.
    """

    multiplier: float
    low: float
    high: float

    def __call__(self, state: Any) -> float:
        """Return the seconds before the next attempt."""
        return max(self.low, grown(self.multiplier, self.high, 2, state.attempt_number - 1))


@dataclass(unsafe_hash=True)
class RetryConfig(Configuration):
    """How a function is retried.

    Attributes:
        max_attempts: Attempts in all, the first one included: 3 means two retries (`retries=2` in `@opero`).
        wait_min, wait_max: Shortest and longest pause: seconds, `timedelta` or text such as "2s".
        wait_multiplier: The pause before retry n is multiplier · 2^(n-1) seconds, within these bounds: that is
            tenacity's `wait_exponential(multiplier, min, max)`, and no growth factor.
        retry_exceptions: Type or tuple of types that are retried; others pass at once.
        reraise: Whether the caller gets the last error itself; False gives a `tenacity.RetryError` from it.

    Raises:
        OperoUsageError: A value cannot work; the message names it and the fix.

    Example:
        >>> RetryConfig(max_attempts=3).as_options()["retries"]
        2
    """

    max_attempts: int = _checked(3, checks.whole(1))
    wait_min: Duration = _checked(1.0, checks.duration)
    wait_max: Duration = _checked(60.0, checks.duration)
    wait_multiplier: float = _checked(1.0, _seconds)
    retry_exceptions: type[BaseException] | tuple[type[BaseException], ...] = _checked(
        (Exception,), checks.failure_filter
    )
    reraise: bool = _checked(True, checks.boolean)

    def __post_init__(self) -> None:
        if isinstance(wanted := cast("Any", self.retry_exceptions), list):
            object.__setattr__(self, "retry_exceptions", tuple(wanted))
        super().__post_init__()
        low, high = self._bounds()
        if low > high:
            raise OperoUsageError(
                f"wait_min={self.wait_min!r} is longer than wait_max={self.wait_max!r}: "
                "raise wait_max or lower wait_min."
            )

    def as_options(self) -> dict[str, Any]:
        """Return the options of `@opero` that do this."""
        wait = _ExponentialWait(self.wait_multiplier, *self._bounds())
        return {"retries": self.max_attempts - 1, "retry_on": self.retry_exceptions, "wait": wait}

    def _bounds(self) -> tuple[float, float]:
        low = parse_seconds(self.wait_min, "wait_min")
        return low, parse_seconds(self.wait_max, "wait_max")


def _limited(name: str, rate: Any) -> None:
    """Check a rate that may not be None."""
    if rate is None:
        raise OperoUsageError(
            f"{name}=None limits nothing: give calls per second, or leave it out."
        )
    checks.rate(name, rate)


@dataclass(unsafe_hash=True)
class RateLimitConfig(Configuration):
    """How often functions are called; one limit for everything that one orchestrator calls.

    Attributes:
        rate: Calls per second, text such as "100/minute", or a `RateLimiter` that others share.

    Example:
        >>> RateLimitConfig(rate=10.0).as_options()
        {'rate_limit': 10.0}
    """

    rate: Any = field(metadata={"check": _limited})

    def as_options(self) -> dict[str, Any]:
        """Return the options of `@opero` that do this."""
        return {"rate_limit": self.rate}


@dataclass(unsafe_hash=True)
class ConcurrencyConfig(Configuration):
    """How many calls are in flight at once, all functions of one orchestrator together.

    Attributes:
        limit: Most calls; `process` works on that many items at once. None means no limit.

    Example:
        >>> ConcurrencyConfig(limit=5).as_options()
        {'concurrency': 5}
    """

    limit: int | None = _checked(None, checks.none_or(checks.whole(1)))

    def as_options(self) -> dict[str, Any]:
        """Return the options of `@opero` that do this."""
        return {} if self.limit is None else {"concurrency": self.limit}


@dataclass(unsafe_hash=True)
class MultiprocessConfig(Configuration):
    """Worker processes for `process`; single calls stay where they are.

    Attributes:
        max_workers: Their number; None for one for each processor.
        backend: "pathos", "multiprocessing", "process" or "aiomultiprocess"; None for "pathos". The names are accepted
            because they are widely known; the workers are opero's own, so that a dead one costs its item and nothing
            else. Each has one item at a time; with "aiomultiprocess" and coroutine functions, many.

    Example:
        >>> MultiprocessConfig(max_workers=2, backend="pathos").as_options()
        {'mode': 'process', 'workers': 2}
    """

    max_workers: int | None = _checked(4, checks.none_or(checks.whole(1)))
    backend: Backend | None = _checked("pathos", checks.none_or(checks.one_of(*get_args(Backend))))

    @property
    def workers(self) -> int:
        """Number of worker processes."""
        return self.max_workers or os.cpu_count() or 1

    def as_options(self) -> dict[str, Any]:
        """Return the options of `@operomap` that do this."""
        mode = "async_process" if self.backend == "aiomultiprocess" else "process"
        return {"mode": mode, "workers": self.workers}


_CACHE_SETTINGS = ("cache_ttl", "cache_backend", "cache_key", "cache_namespace")
_PLACES = {
    **dict.fromkeys(("retries", "retry_on", "wait"), "retry_config"),
    **dict.fromkeys(("backoff_factor", "min_delay", "max_delay", "jitter"), "retry_config"),
    "rate_limit": "rate_limit_config",
    "concurrency": "concurrency_config",
}
"""Options of `@opero` that have another name in the configuration."""


@dataclass(unsafe_hash=True, repr=False)
class OrchestratorConfig(Configuration):
    """All settings of an `Orchestrator`; what is left out is off.

    Attributes:
        retry_config, rate_limit_config, concurrency_config, multiprocess_config: As above, or None.
        fallbacks: Functions to call in order when the first function has used up its attempts, each with attempts
            of its own.
        logger: A logger of the standard library, which gets a line for each event.
        cache: Whether results are cached.
        cache_ttl, cache_backend, cache_key, cache_namespace: As in `@opero`; they need `cache=True`.
        options: Any other options of `@opero`, such as `{"timeout": 5, "circuit_breaker": True}`.

    Raises:
        OperoUsageError: A value cannot work; the message names it and the fix.

    Example:
        >>> OrchestratorConfig(rate_limit_config=RateLimitConfig(10), options={"timeout": 5})
        OrchestratorConfig(rate_limit_config=RateLimitConfig(rate=10), options={'timeout': 5})
    """

    retry_config: RetryConfig | None = _part(RetryConfig)
    rate_limit_config: RateLimitConfig | None = _part(RateLimitConfig)
    concurrency_config: ConcurrencyConfig | None = _part(ConcurrencyConfig)
    multiprocess_config: MultiprocessConfig | None = _part(MultiprocessConfig)
    fallbacks: Callable[..., Any] | Iterable[Callable[..., Any]] = ()
    logger: EventLogger | None = _checked(None, checks.none_or(checks.logger))
    cache: bool = False
    cache_ttl: Duration | None = 3600
    cache_backend: Any = "memory"
    cache_key: Callable[..., object] | None = None
    cache_namespace: str = "opero"
    options: Mapping[str, Any] = field(
        default_factory=dict, hash=False, metadata={"check": _options}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fallbacks", functions("fallbacks", self.fallbacks))
        if not self.cache:
            for f in dataclasses.fields(self):
                if f.name in _CACHE_SETTINGS and self._differs(f):
                    raise OperoUsageError(
                        f"{f.name}={getattr(self, f.name)!r} does nothing without cache=True."
                    )
        elif self.multiprocess_config is not None and self.cache_backend == "memory":
            raise OperoUsageError(
                "cache=True with multiprocess_config: the memory of a worker process ends with it, so write "
                "cache_backend='disk'."
            )
        Options.of("OrchestratorConfig", **self.as_options())

    def as_options(self) -> dict[str, Any]:
        """Return the options of `@opero` for a single call.

        Raises:
            OperoUsageError: `options` names a setting that has a place of its own.
        """
        made: dict[str, Any] = {"cache": self.cache, "retries": 0}
        if self.cache:
            made |= {name: getattr(self, name) for name in _CACHE_SETTINGS}
        for part in (self.retry_config, self.rate_limit_config, self.concurrency_config):
            if part is not None:
                made |= part.as_options()
        places = {f.name: f.name for f in dataclasses.fields(self)} | _PLACES
        for name in self.options:
            if name in places:
                raise OperoUsageError(
                    f"options: {name!r} has a place of its own: write {places[name]}=..."
                )
        return made | dict(self.options)

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={masked_repr(getattr(self, f.name), f.name)}"
            for f in dataclasses.fields(self)
            if self._differs(f)
        )
        return f"OrchestratorConfig({shown})"

    def _differs(self, given: dataclasses.Field[Any]) -> bool:
        value = getattr(self, given.name)
        return bool(value) if given.name == "options" else value != given.default


def functions(name: str, given: Any) -> tuple[Callable[..., Any], ...]:
    """Return one function, several or none as a tuple.

    Raises:
        OperoUsageError: Something in it cannot be called.
    """
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, Iterable) and not callable(given) else (given,)
    if not all(callable(function) for function in several):
        raise OperoUsageError(f"{name}={given!r} must be a function or a list of functions.")
    return several
