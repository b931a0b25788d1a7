# this_file: src/opero/tasks/callee.py
"""What a task calls: how, and whether the function asks for an input.

All of it is decided when the task is made, from the signature alone, so that no run can go another way.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from inspect import Parameter, Signature
from typing import Any
from weakref import WeakKeyDictionary

from opero.core.function import FunctionInfo, describe_function
from opero.errors import OperoUsageError

__all__ = ["Callee", "asks_for_input", "callee_of", "is_plain"]


class Callee:
    """A function as tasks see it.

    It does not hold the function, which may live shorter.

    Args:
        info: The function.

    Attributes:
        name: The function's name.
        is_async: Whether it is called on the event loop.
    """

    __slots__ = ("_asks", "_counts", "_signatures", "is_async", "name")

    def __init__(self, info: FunctionInfo) -> None:
        self.name: str = info.name
        self.is_async: bool = info.kind == "async"
        # What a decorator says of its function need not be how it wants to be called.
        self._signatures = (info.declared, info.calling)
        self._asks = asks_for_input(info.declared)
        self._counts = _positional(info.declared)

    def takes_input(self, args: tuple[Any, ...], given: Collection[str]) -> bool:
        """Tell whether a value that comes along becomes the first argument.

        Args:
            args: The task's own positional arguments: who has some keeps them.
            given: Names of its own keyword arguments.
        """
        return not args and self._asks is not None and self._asks not in given

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments that the function cannot be called with, whatever input comes along.

        Raises:
            OperoUsageError: They do not fit.
        """
        count = len(args)
        takes = self.takes_input(args, kwargs)
        if self._counts is not None and not kwargs:
            least, most = self._counts
            if least <= count + takes and count <= most:
                return
        filled = (*args, None) if takes else args
        refused: TypeError | None = None
        for signature in self._signatures:
            try:
                signature.bind(*filled, **kwargs)
            except TypeError as error:
                refused = refused or error
            else:
                return
        raise OperoUsageError(
            f"Task({self.name}, ...) cannot be called: {refused}{' besides its input' * takes}. "
            f"Give all that {self.name}() needs: Task({self.name}, value, key=value)."
        )


def asks_for_input(signature: Signature) -> str | None:
    """Return the parameter that an input goes to, None if there is none.

    It is the first positional one. A default is a setting, and stays; but for parameters without a name, as those of
    `list` and `float` are.

    Example:
        >>> import inspect
        >>> asks_for_input(inspect.signature(lambda text, width=80: text))
        'text'
        >>> asks_for_input(inspect.signature(lambda width=80: width)) is None
        True
    """
    for parameter in signature.parameters.values():
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL):
            return parameter.name
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
            return parameter.name if parameter.default is Parameter.empty else None
    return None


def _positional(signature: Signature) -> tuple[int, float] | None:
    """Return the least and the largest number of positional arguments; None if some must go by keyword."""
    least, most = 0, 0.0
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            most = float("inf")
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            if parameter.default is Parameter.empty:
                return None
        elif parameter.kind is not Parameter.VAR_KEYWORD:
            most += 1
            least += parameter.default is Parameter.empty
    return least, most


_known: WeakKeyDictionary[Callable[..., Any], Callee] = WeakKeyDictionary()


def is_plain(fn: object) -> bool:
    """Tell whether it is a function and nothing else: these are equal to nobody else, and can be looked up."""
    return type(fn) is types.FunctionType


def callee_of(fn: Callable[..., Any]) -> Callee:
    """Look at a function, once.

    Raises:
        OperoUsageError: It is not callable.
    """
    if not is_plain(fn):
        if not callable(fn):
            raise OperoUsageError(
                f"a task needs something callable, not {type(fn).__name__}: "
                "write Task(fetch, url), not Task(fetch(url))."
            )
        return Callee(describe_function(fn))
    found = _known.get(fn)
    if found is None:
        found = _known[fn] = Callee(describe_function(fn))
    return found
