# this_file: src/opero/core/function.py
"""What opero knows about a function that it decorates: its kind, names and parameters."""

from __future__ import annotations

import functools
import inspect
import keyword
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from opero.errors import OperoUsageError, did_you_mean
from opero.utils.async_utils import is_async_function

__all__ = ["FunctionInfo", "Kind", "describe_function", "stars", "unwrap_partial"]

_RECEIVERS: Final = frozenset({"self", "cls", "mcs", "this"})
Kind = Literal["sync", "async", "generator", "async_generator"]


@dataclass(frozen=True, slots=True, eq=False)
class FunctionInfo:
    """A function to be decorated.

    Attributes:
        fn: The function itself, called exactly as it is.
        kind: How it is called and awaited or iterated.
        name: Short name, for messages ("call_llm").
        module: Module it was defined in.
        qualname: Qualified name ("Client.call_llm").
        calling: Signature with which `fn` is really called.
        declared: Signature that users see: that of the innermost wrapped function. Names of
            parameters (fallback, cache keys, secrets) refer to it.
        in_class: Whether it was defined in a class body, so that its first parameter is an
            instance or class.
    """

    fn: Callable[..., Any]
    kind: Kind
    name: str
    module: str
    qualname: str
    calling: inspect.Signature
    declared: inspect.Signature
    in_class: bool

    @property
    def owner(self) -> str:
        """What tells it from all others, also where one decorated function is decorated again."""
        within = getattr(unwrap_partial(self.fn), "__opero__", None)
        return f"{self.module}.{self.qualname}" if within is None else f"{within.info.owner}'"

    @property
    def bound(self) -> int:
        """How many arguments stand before the caller's own: the instance or class, where there is one.

        A static method stands in a class body too; what tells it apart is the name of its first parameter.
        """
        first = self.parameters[:1]
        return int(self.in_class and bool(first) and first[0].strip("_") in _RECEIVERS)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the declared parameters, without the stars."""
        return tuple(self.declared.parameters)

    def require_parameter(self, name: str, option: str) -> inspect.Parameter:
        """Return the declared parameter `name`, or raise an error that lists those that exist."""
        found = self.declared.parameters.get(name)
        if found is not None and found.kind not in (found.VAR_POSITIONAL, found.VAR_KEYWORD):
            return found
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in self.declared.parameters.values() if p.kind not in starred]
        raise OperoUsageError(
            f"{option}={name!r}: {self.name}() has no parameter {name!r}."
            f"{did_you_mean(name, names)} Its parameters: {', '.join(names) or 'none'}."
        )


def describe_function(fn: Callable[..., Any]) -> FunctionInfo:
    """Look at a callable and tell how it must be wrapped.

    Args:
        fn: A function, method, `functools.partial` or object with `__call__` (also `async`).

    Returns:
        Its description.

    Raises:
        OperoUsageError: `fn` is not callable.
    """
    if not callable(fn):
        raise OperoUsageError(
            f"opero can only decorate something callable, not {type(fn).__name__}. "
            "Options are keyword-only: write @opero(retries=3)."
        )
    named = unwrap_partial(fn)
    qualname = getattr(named, "__qualname__", type(named).__qualname__)
    owner = qualname.rpartition(".")[0]
    return FunctionInfo(
        fn=fn,
        kind=_kind(fn),
        name=getattr(named, "__name__", type(named).__name__),
        module=getattr(named, "__module__", None) or type(named).__module__,
        qualname=qualname,
        calling=_calling(fn),
        declared=_signature(fn),
        in_class=inspect.isfunction(fn) and bool(owner) and not owner.endswith("<locals>"),
    )


def stars(parameter: inspect.Parameter) -> str:
    """Return what stands before a parameter's name in a `def`."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return "*"
    return "**" if parameter.kind is parameter.VAR_KEYWORD else ""


def unwrap_partial(fn: Callable[..., Any]) -> Any:
    """Return what stands inside all layers of `functools.partial`: it has the name and the docs."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _kind(fn: Callable[..., Any]) -> Kind:
    target = unwrap_partial(fn)
    if not (inspect.isroutine(target) or inspect.isclass(target)):
        # An object is called through its class, so that is where `async def __call__` shows.
        target = type(target).__call__
    if inspect.isasyncgenfunction(target):
        return "async_generator"
    if inspect.isgeneratorfunction(target):
        return "generator"
    return "async" if is_async_function(fn) else "sync"


_ANYTHING = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def _signature(fn: Callable[..., Any], *, follow_wrapped: bool = True) -> inspect.Signature:
    try:
        return inspect.signature(fn, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        # Some builtins tell nothing about their parameters.
        return _ANYTHING


def _calling(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature that the wrapper gets and passes the arguments on with."""
    if isinstance(fn, types.FunctionType) and hasattr(fn, "__signature__"):
        # What a function says of itself may hide parameters; what is called is its code.
        bare = types.FunctionType(fn.__code__, {}, fn.__name__, fn.__defaults__, fn.__closure__)
        bare.__kwdefaults__ = fn.__kwdefaults__
        fn = bare
    found = _signature(fn, follow_wrapped=False)
    return found if all(_can_be_declared(name) for name in found.parameters) else _ANYTHING


def _can_be_declared(name: str) -> bool:
    """Tell whether generated code may have a parameter of that name; its own names begin so too."""
    return not (keyword.iskeyword(name) or name.startswith("_opero_"))
