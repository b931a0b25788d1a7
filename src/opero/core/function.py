# this_file: src/opero/core/function.py
"""Describe a function to be decorated, count its calls, and bind decorated functions of classes to their instances."""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from opero.caching.plain_types import field_names
from opero.errors import OperoUsageError, did_you_mean
from opero.utils.async_utils import is_async_function
from opero.utils.parameters import (
    POSITIONAL_OR_KEYWORD,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Parameter,
    called_parameters,
    shown_parameters,
    unwrap_partial,
)

if TYPE_CHECKING:
    import inspect


_RECEIVERS: Final = frozenset({"self", "cls", "klass", "mcs", "this"})
Kind = Literal["sync", "async", "generator", "async_generator"]


class FunctionInfo:
    """A function to be decorated, and how it must be wrapped.

    Args:
        fn: A function, method, `functools.partial` or object with `__call__` (also `async`).

    Attributes:
        fn: The function itself, called exactly as it is.
        kind: How it is called and awaited or iterated.
        name: Short name, for messages ("call_llm").
        module: Module it was defined in.
        qualname: Qualified name ("Client.call_llm").
        calling: Parameters with which `fn` is really called.
        parameters: Parameters that users see: those of the innermost wrapped function. Names of
            parameters (fallback, cache keys, secrets) refer to them.
        in_class: Whether it was defined in a class body, so that its first parameter is an
            instance or class.
        is_method: Whether that is so, or it is a static method; None where it is not known.

    Raises:
        OperoUsageError: `fn` is not callable.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise OperoUsageError(
                f"opero can only decorate something callable, not {type(fn).__name__}. "
                "Options are keyword-only: write @opero(retries=3)."
            )
        named = unwrap_partial(fn)
        self.fn: Callable[..., Any] = fn
        self.kind: Kind = _kind(fn)
        self.name: str = getattr(named, "__name__", type(named).__name__)
        self.module: str = getattr(named, "__module__", None) or type(named).__module__
        self.qualname: str = getattr(named, "__qualname__", type(named).__qualname__)
        self.calling: tuple[Parameter, ...] = called_parameters(fn)
        self.parameters: tuple[Parameter, ...] = shown_parameters(fn)
        within = self.qualname.rpartition(".")[0]
        plain = isinstance(fn, types.FunctionType)
        self.in_class: bool = plain and bool(within) and not within.endswith("<locals>")
        self.is_method: bool | None = None
        self._described = fn

    @functools.cached_property
    def declared(self) -> inspect.Signature:
        """The parameters that users see, as a signature that binds arguments and knows the annotations."""
        import inspect

        try:
            return inspect.signature(self._described)
        except (TypeError, ValueError):
            return inspect.signature(lambda *args, **kwargs: None)  # some builtins have none

    def wraps(self, wrapper: types.FunctionType) -> Callable[..., Any]:
        """Give a wrapper what the function carries, as `functools.wraps` does, and return it."""
        if not isinstance(self.fn, types.FunctionType):
            import inspect

            if not inspect.isroutine(self.fn):
                # What a class, an object or a partial carries is its own and not the function's.
                wrapper.__doc__ = unwrap_partial(self.fn).__doc__
                return functools.update_wrapper(wrapper, self.fn, assigned=(), updated=())
        return functools.update_wrapper(wrapper, self.fn)

    @property
    def owner(self) -> str:
        """Name that distinguishes it from all others, also where one decorated function is decorated again."""
        within = getattr(unwrap_partial(self.fn), "__opero__", None)
        return f"{self.module}.{self.qualname}" if within is None else f"{within.info.owner}'"

    @property
    def bound(self) -> int:
        """How many arguments stand before the caller's own: the instance or class, where there is one.

        A static method stands in a class body too; as long as nothing else says what it is, the name of the first
        parameter does.
        """
        if self.is_method is not None:
            return int(self.is_method)
        first = self.parameters[:1]
        return int(self.in_class and bool(first) and first[0].name.strip("_") in _RECEIVERS)

    def single_use_argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return the name of a parameter whose argument a first call may have used up, None if there is none."""
        positional = [p.name for p in self.parameters if p.kind <= POSITIONAL_OR_KEYWORD]
        for n, value in enumerate(args):
            if n >= self.bound and _holds_single_use(value):
                return positional[n] if n < len(positional) else f"argument {n + 1}"
        return next((name for name, value in kwargs.items() if _holds_single_use(value)), None)

    def require_parameter(self, name: str, option: str) -> Parameter:
        """Return the declared parameter `name`, or raise an error that lists those that exist."""
        named = {p.name: p for p in self.parameters if p.kind not in (VAR_POSITIONAL, VAR_KEYWORD)}
        if name in named:
            return named[name]
        raise OperoUsageError(
            f"{option}={name!r}: {self.name}() has no parameter {name!r}."
            f"{did_you_mean(name, named)} Its parameters: {', '.join(named) or 'none'}."
        )


_MOST_PARTS: Final = 1000
"""Parts of an argument that are looked at."""


def _holds_single_use(value: object) -> bool:
    """Whether an argument is an iterator or an open file, or holds one in containers or declared fields."""
    parts, seen = [value], 0
    while parts and seen < _MOST_PARTS:
        part = parts.pop()
        seen += 1
        if _is_single_use(part):
            return True
        parts += itertools.islice(_parts_of(part), _MOST_PARTS)
    return False


def _parts_of(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, types.SimpleNamespace):
        return vars(value).values()
    return [getattr(value, name, None) for name in field_names(type(value)) or ()]


def _is_single_use(value: object) -> bool:
    """Whether something is an iterator, a coroutine, an open file or a streamed response: reading it changes it."""
    kind = type(value)
    if hasattr(kind, "__next__") or hasattr(kind, "__anext__"):
        # Endless ones serve as a source of numbers, and a database's cursor is there to be used again.
        return kind not in (itertools.count, itertools.cycle, itertools.repeat) and not hasattr(
            kind, "execute"
        )
    if hasattr(kind, "__await__"):
        return hasattr(kind, "send")  # tasks and futures can be awaited again
    try:
        return _is_open(value)
    except Exception:  # noqa: BLE001 - a property may raise anything
        return False


def _is_open(value: Any) -> bool:
    """Whether something that is no iterator gives what it holds once: a temporary file, a streamed response."""
    if any(hasattr(value, name) for name in ("read", "iter_bytes", "aiter_bytes")):
        # Archives are read by name, connections of a database are used again.
        reused = any(hasattr(value, name) for name in ("namelist", "execute", "cursor"))
        return not reused and any(
            getattr(value, name, None) is False for name in ("closed", "is_closed")
        )
    # The body of a response of requests.
    return hasattr(value, "iter_content") and getattr(value, "_content", None) is False


def used_up(name: str) -> str:
    """Say why there is no second call with an argument that can be read only once."""
    return f"{name} is an iterator or file, which the first call may have used up: give a list, or retries=0"


_ITERATORS: Final[dict[int, Kind]] = {0x20: "generator", 0x200: "async_generator"}
"""By the flag of the code (`inspect.CO_GENERATOR`, `CO_ASYNC_GENERATOR`)."""


def _kind(fn: Callable[..., Any]) -> Kind:
    if is_async_function(fn):
        return "async"
    target = unwrap_partial(fn)
    if not isinstance(target, types.FunctionType):
        import inspect

        if not (inspect.isroutine(target) or inspect.isclass(target)):
            # An object is called through its class, so that is where its kind shows.
            target = type(target).__call__
    flags = getattr(getattr(target, "__code__", None), "co_flags", 0)
    for flag, kind in _ITERATORS.items():
        if flags & flag:
            return kind
    return "sync"


if TYPE_CHECKING:
    _ClassMethod = classmethod[Any, Any, Any]
else:
    _ClassMethod = classmethod

_TAKES_ARGUMENTS = ("call", "map", "one", "process", "stream")
"""Attributes of a decorated function that take the function's own arguments."""


class _OfFunction(str):
    """A class's `__doc__` or `__module__`: on an instance it is that of the instance's function."""

    __slots__ = ("attribute",)
    attribute: str

    def __new__(cls, text: str | None, attribute: str) -> Self:
        made = super().__new__(cls, text or "")
        made.attribute = attribute
        return made

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return str(self) if instance is None else getattr(instance.func, self.attribute)


class Method(functools.partial[Any]):
    """What stands in the class: a descriptor around the plain decorated function.

    A `functools.partial`, because `inspect` and `asyncio` look through partials. It says that it is
    a function, as mocks and proxies do: pydantic, `unittest.mock` and `inspect` treat what stands
    in a class body by what it is an instance of.
    """

    __doc__ = _OfFunction(__doc__, "__doc__")
    __module__ = _OfFunction(__name__, "__module__")

    @property  # type: ignore[misc]  # objects in general may get another class, these may not
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The type of a function."""
        return types.FunctionType

    def __set_name__(self, owner: type, name: str) -> None:
        """Make it a method, whatever its first parameter is called: a static one stands in a `staticmethod`."""
        if (make := vars(self).get("make_method")) is not None:
            setattr(owner, name, make())

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an instance; the class itself gives the plain function."""
        return self.func if instance is None else BoundMethod(self.func, instance)

    def __getattr__(self, name: str) -> Any:
        if name in _TAKES_ARGUMENTS and self.func.__code__.co_varnames[:1] == ("cls",):
            # Python 3.13 no longer asks what stands inside a `classmethod` to bind itself.
            raise AttributeError(
                f"{self.func.__qualname__}.{name} does not know its class: "
                "write @opero above @classmethod."
            )
        return getattr(self.func, name)

    def __reduce__(self) -> Any:
        return self.func.__qualname__  # by name, as functions

    def __setattr__(self, name: str, value: object) -> None:
        # What `abstractmethod` and its like write is looked for on the function.
        setattr(self.func, name, value)

    def __repr__(self) -> str:
        return repr(self.func)


class ClassMethod(_ClassMethod):
    """A class method around the plain decorated function."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to the class."""
        return BoundMethod(self.__func__, type(instance) if owner is None else owner)


class BoundMethod(functools.partial[Any]):
    """A decorated function bound to an instance or class.

    For introspection it is a method, so that signature, source and kind are the function's.
    """

    __doc__ = _OfFunction(__doc__, "__doc__")
    __module__ = _OfFunction(__name__, "__module__")

    @property  # type: ignore[misc]  # objects in general may get another class, these may not
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The type of a method."""
        return types.MethodType

    @property
    def __self__(self) -> Any:
        """The instance or class."""
        return self.args[0]

    @property
    def __func__(self) -> Callable[..., Any]:
        """The decorated function."""
        return self.func

    @property
    def cache(self) -> Any:
        """The function's cache, with the instance filled in; None where there is none."""
        handle = getattr(self.func, "cache", None)
        return None if handle is None else _BoundCache(handle, self.args[0])

    def with_options(self, **changes: Any) -> BoundMethod:
        """Return the same method of the same instance with other options."""
        decorated: Any = self.func
        return BoundMethod(decorated.with_options(**changes).func, self.args[0])

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.func, name)
        return functools.partial(value, *self.args) if name in _TAKES_ARGUMENTS else value

    def __reduce__(self) -> tuple[Any, ...]:
        # As methods do; what the instance does not give by that name goes by its function.
        instance, name = self.args[0], self.func.__name__
        if getattr(instance, name, None) == self:
            return getattr, (instance, name)
        return _bind, (self.func, instance)

    def __eq__(self, other: object) -> bool:
        if type(other) is not BoundMethod:
            return NotImplemented
        return self.func is other.func and self.args[0] is other.args[0]

    def __hash__(self) -> int:
        return hash((id(self.func), id(self.args[0])))

    def __repr__(self) -> str:
        return f"<bound method {self.func.__qualname__} of {self.args[0]!r}>"


def _bind(function: Callable[..., Any], instance: object) -> BoundMethod:
    return BoundMethod(function, instance)


class _BoundCache:
    """The `.cache` of a bound method: arguments without the instance."""

    __slots__ = ("_handle", "_instance")

    def __init__(self, handle: Any, instance: object) -> None:
        self._handle = handle
        self._instance = instance

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._handle, name)
        takes = name in ("ainvalidate", "invalidate", "key", "refresh")
        return functools.partial(value, self._instance) if takes else value

    def __repr__(self) -> str:
        return repr(self._handle)


# --- counters -------------------------------------------------------------------------------------


class FastCounter:
    """A counter for the fast path: one C call to count, no lock.

    `count()` is the bound `__next__` of an `itertools.count`, which is atomic. Its state is read
    from its `repr`, because copying or pickling a count is deprecated since Python 3.12.
    """

    __slots__ = ("_counter", "_zero", "count")

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._zero = 0
        self.count: Callable[[], int] = self._counter.__next__

    @property
    def value(self) -> int:
        """How often `count` was called since the last reset."""
        return self._counted() - self._zero

    def reset(self) -> None:
        """Count from zero again."""
        # Fast paths hold `count`, so the zero moves instead of the counter.
        self._zero = self._counted()

    def add(self, amount: int) -> None:
        """Count what was counted elsewhere; callers hold a lock of their own."""
        self._zero -= amount

    def _counted(self) -> int:
        return int(repr(self._counter)[6:-1])


class Stats:
    """What happened to a decorated function since it was decorated (or since `reset()`).

    Attributes:
        calls: Real calls of the function, failed ones included.
        failures: Real calls that raised, or whose result was rejected.
        retries: Attempts after the first.
        fallbacks: Steps to another fallback value.
        gave_up: Calls that failed for good.
        hits: Results served from the cache.
        misses: Calls that found nothing fresh in the cache.
        shared: Calls that got the result of another caller's computation.
        stale: Calls that got an expired result, because the function failed.
        slept: Seconds of pauses between attempts, of all calls together.
        waited: Seconds in the rate limiter, of all calls together.

    Example:
        >>> from opero import opero
        >>> @opero
        ... def double(x):
        ...     return 2 * x
        >>> double(1), double(1)
        (2, 2)
        >>> double.stats
        <Stats calls=1 hits=1 misses=1>
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.call_counter: Final = FastCounter()
        self.hit_counter: Final = FastCounter()
        self.miss_counter: Final = FastCounter()
        self._counters = {
            "calls": self.call_counter,
            "hits": self.hit_counter,
            "misses": self.miss_counter,
        }
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        with self._lock:
            for counter in self._counters.values():
                counter.reset()
            self.failures = self.retries = self.fallbacks = self.gave_up = 0
            self.shared = self.stale = 0
            self.slept: float = 0.0
            self.waited: float = 0.0

    @property
    def calls(self) -> int:
        """Real calls of the function."""
        return self.call_counter.value

    @property
    def hits(self) -> int:
        """Results served from the cache."""
        return self.hit_counter.value

    @property
    def misses(self) -> int:
        """Calls that found nothing in the cache."""
        return self.miss_counter.value

    def add(self, **amounts: float) -> None:
        """Add to several counters at once; off the fast path only."""
        with self._lock:
            for name, amount in amounts.items():
                if name in self._counters:
                    self._counters[name].add(int(amount))
                else:
                    setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        """Return all counters by name."""
        names = ("calls", "failures", "retries", "fallbacks", "gave_up", "hits", "misses", "shared")
        return {name: getattr(self, name) for name in (*names, "stale", "slept", "waited")}

    def take(self) -> dict[str, float]:
        """Return the counters that are not zero, by name, and set them to zero."""
        counted = {name: value for name, value in self.as_dict().items() if value}
        self.reset()
        return counted

    def __repr__(self) -> str:
        counted = {name: value for name, value in self.as_dict().items() if value}
        shown = " ".join(
            f"{name}={value if isinstance(value, int) else format(value, '.4g')}"
            for name, value in counted.items()
        )
        return f"<Stats {shown or 'nothing yet'}>"
