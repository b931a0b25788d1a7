# this_file: src/opero/core/method.py
"""Decorated functions in class bodies: `obj.m(...)`, `obj.m.call(...)`, `obj.m.cache` see `obj`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

__all__ = ["BoundMethod", "ClassMethod", "Method"]

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

    For everybody who asks it is a method, so that signature, source and kind are the function's.
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
