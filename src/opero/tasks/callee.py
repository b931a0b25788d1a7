# this_file: src/opero/tasks/callee.py
"""Call the function of a task: check its arguments, run it off the event loop, apply its options.

Whether the function takes an input is decided when the task is made, from the signature alone, so that all runs
behave alike.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Collection, Mapping
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opero.core.call import Call
from opero.core.function import FunctionInfo
from opero.errors import OperoUsageError
from opero.utils.async_utils import call_in_thread

if TYPE_CHECKING:
    from opero.core.options import Options
    from opero.events import Handler


class Callee:
    """Name, kind and signature of a task's function, without a reference to the function.

    Args:
        info: The function.

    Attributes:
        name: The function's name.
        module: Its module.
        is_async: Whether it is called on the event loop.
        variant: The `@opero` function that tasks without options of their own call; None before the first one.
    """

    __slots__ = ("_fitting", "_input", "_signatures", "is_async", "module", "name", "variant")

    def __init__(self, info: FunctionInfo) -> None:
        self.name: str = info.name
        self.module: str | None = info.module
        self.is_async: bool = info.kind == "async"
        self.variant: Any = None
        self._signatures = (info.declared, *_called_with(info.fn))
        self._input = input_parameter(info.declared)
        # How many positional arguments, and which keywords, have been found to fit.
        self._fitting: set[tuple[int, tuple[str, ...]]] = set()

    def takes_input(self, args: tuple[Any, ...], given: Collection[str]) -> bool:
        """Return whether an input becomes the first argument.

        Args:
            args: The task's own positional arguments: a task that has some takes no input.
            given: Names of its own keyword arguments.
        """
        return not args and self._input is not None and self._input not in given

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that the function cannot be called with, with or without an input.

        Raises:
            OperoUsageError: They do not fit.
        """
        shape = len(args), tuple(kwargs)
        if shape in self._fitting:
            return
        takes = self.takes_input(args, kwargs)
        filled = (*args, None) if takes else args
        refused: TypeError | None = None
        for signature in self._signatures:
            try:
                signature.bind(*filled, **kwargs)
            except TypeError as error:
                refused = refused or error
            else:
                self._fitting.add(shape)
                return
        raise OperoUsageError(
            f"Task({self.name}, ...) cannot be called: {refused}{' in addition to its input' * takes}. "
            f"Give all arguments that {self.name}() needs: Task({self.name}, value, key=value)."
        )


def _called_with(fn: Callable[..., Any]) -> tuple[Signature, ...]:
    """Return the signature that a function can be called with, where its decorator shows another one."""
    try:
        return (inspect.signature(fn, follow_wrapped=False),)
    except (TypeError, ValueError):
        return ()  # a builtin without one


def input_parameter(signature: Signature) -> str | None:
    """Return the parameter that an input goes to, None if there is none.

    It is the first positional one, if it has no default: a default is a setting, and stays. Positional-only
    parameters take the input in any case, as those of `list` and `float` do.

    Example:
        >>> import inspect
        >>> input_parameter(inspect.signature(lambda text, width=80: text))
        'text'
        >>> input_parameter(inspect.signature(lambda width=80: width)) is None
        True
    """
    for parameter in signature.parameters.values():
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL):
            return parameter.name
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            return parameter.name if parameter.default is Parameter.empty else None
    return None


_known: WeakKeyDictionary[Callable[..., Any], Callee] = WeakKeyDictionary()


def callee_of(fn: Callable[..., Any]) -> Callee:
    """Describe a function; plain functions are described once.

    Raises:
        OperoUsageError: It is not callable.
    """
    # Plain functions are equal to no other, and can be dict keys.
    if type(fn) is not types.FunctionType:
        if not callable(fn):
            raise OperoUsageError(
                f"a task needs something callable, not {type(fn).__name__}: "
                "write Task(fetch, url), not Task(fetch(url))."
            )
        return Callee(FunctionInfo(fn))
    found = _known.get(fn)
    if found is None:
        found = _known[fn] = Callee(FunctionInfo(fn))
    return found


# --- options ----------------------------------------------------------------------------------------


def with_policies(
    fn: Any, callee: Callee, options: Mapping[str, Any] | None, note_retry: Handler
) -> Callable[..., Awaitable[Any]]:
    """Return a coroutine function that calls `fn` through the stages that it or `options` switch on.

    Args:
        fn: The function.
        callee: Its description.
        options: Options of `@opero`; None without.
        note_retry: A listener, for functions that are retried.

    Raises:
        OperoUsageError: An option is unknown or wrong.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OperoUsageError(f"options={options!r} must be a dict: options=dict(retries=3).")
    given = dict(options or {})
    if hasattr(fn, "__opero__"):
        decorated = _variant(fn, callee, given, note_retry)
        return decorated if callee.is_async else functools.partial(call_in_thread, decorated)
    # Loaded with the first task that has options: the others run without a pipeline.
    from opero.core.options import Options
    from opero.core.pipeline import Pipeline

    made = Options.of("Task", **{"cache": False, "retries": 0, **given})
    if made.retries or made.stop:
        made = made.replace("Task", on_event=[*made.listeners, note_retry])
    info = FunctionInfo(fn)
    if not callee.is_async:
        # On the loop, so that a pause between attempts holds no thread.
        info.fn, info.kind = functools.partial(call_in_thread, fn), "async"
    pipeline = Pipeline(info, made)

    def call(*args: Any, **kwargs: Any) -> Any:
        return pipeline.run(Call(args, kwargs))

    return call


def _variant(fn: Any, callee: Callee, given: dict[str, Any], note_retry: Handler) -> Any:
    """Return an `@opero` function with other options that reports retries to its run; one for equal tasks."""
    if not given and callee.variant is not None:
        return callee.variant
    options: Options = fn.options.replace("Task", **given)
    changes = dict(given)
    if options.retries or options.stop:
        changes["on_event"] = [*options.listeners, note_retry]
    variant = fn.with_options(**changes) if changes else fn
    if not given and variant is not fn:
        callee.variant = variant
    return variant
