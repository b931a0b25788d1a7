# this_file: src/opero/decorators/opero.py
"""`@opero`: the pipeline around one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, ParamSpec, cast

from opero.core.decorate import decorate
from opero.core.options import Options
from opero.errors import OperoUsageError

if TYPE_CHECKING:
    from opero.core.decorate import BuildFunction
    from opero.core.decorated import Decorator

__all__ = ["decorator_of", "opero"]

O = ParamSpec("O")  # noqa: E741 - the options of a decorator


def decorator_of(
    kind: Callable[O, Options], name: str, *, build: BuildFunction | None = None
) -> Decorator[O]:
    """Make a decorator that works bare and called, and takes the options that `kind` declares.

    Args:
        kind: A dataclass of options.
        name: Name of the decorator, for messages.
        build: Makes the function that users call; None for the one that makes single calls.
    """
    options_class = cast("type[Options]", kind)

    def decorate_with(fn: Callable[..., Any] | None = None, /, *args: Any, **options: Any) -> Any:
        if args or (fn is not None and options):
            raise OperoUsageError(
                f"{name}() takes a function, or options by keyword, not both: "
                f"write @{name}(retries=3) above the function, or {name}(retries=3)(function)."
            )
        made = options_class.of(name, **options)
        if fn is None:
            return lambda function: decorate(function, made, by=name, build=build)
        return decorate(fn, made, by=name, build=build)

    decorator: Any = decorate_with  # mypy knows no `__wrapped__` on functions
    decorator.__name__ = decorator.__qualname__ = name
    decorator.__module__ = "opero"
    decorator.__doc__ = (
        f"Make calls of a function dependable: @{name}, or @{name}(option=value, ...).\n\n"
        f"{options_class.__doc__ or ''}"
    )
    # `inspect` shows the options as its parameters.
    decorator.__wrapped__ = options_class
    decorator.__annotations__ = {}
    return cast("Decorator[O]", decorator)


opero: Final = decorator_of(Options, "opero")
