# this_file: src/opero/utils/lazy.py
"""Keep starting a program cheap: public names and libraries that are imported late, and named tuples."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any


def export_lazily(
    package: str, modules: Mapping[str, Iterable[str]], *, gone: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Give a package the public names of its modules; each is loaded when it is first asked for (PEP 562).

    Sets `__getattr__`, `__dir__` and `__all__`. Type checkers find the names in imports of the form
    `from module import name as name`.

    Args:
        package: Name of the package.
        modules: Module → the public names that it holds.
        gone: Name of former versions → what to write instead; asking for one is an `ImportError`.

    Returns:
        The package's `__getattr__`.
    """
    homes = {name: module for module, names in modules.items() for name in names}
    own = vars(sys.modules[package])

    def load(name: str) -> Any:
        if name not in homes:
            if gone is not None and name in gone:
                raise ImportError(f"{package} has no {name!r} any more: {gone[name]}", name=package)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = own[name] = getattr(import_module(homes[name]), name)
        return value

    own |= {
        "__all__": sorted(homes),
        "__dir__": lambda: sorted({*own, *homes}),
        "__getattr__": load,
    }
    return load


def load_extra(module: str, extra: str) -> Any:
    """Import a module of a library that an extra of opero brings.

    Raises:
        ModuleNotFoundError: It is not installed; the message is the line to type.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'opero[{extra}]'", name=error.name
        ) from error


# --- named tuples ---------------------------------------------------------------------------------

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 - exported
else:

    class _Definition(type):
        """Make a class that is defined with annotations a subclass of `collections.namedtuple`."""

        def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> type:
            if not bases:
                return super().__new__(cls, name, bases, content)
            fields = content["__annotations__"]
            defaults = [content.pop(field) for field in fields if field in content]
            made = namedtuple(name, fields, defaults=defaults)  # noqa: PYI024 - checkers see typing's
            return type(name, (made,), {"__slots__": (), **content})

    class NamedTuple(metaclass=_Definition):
        """What `typing.NamedTuple` is, but annotations are not compiled.

        Compiling those of twenty such classes, and making the classes of `ast` that it needs, were a fifth of what
        importing opero costs.

        Example:
            >>> class Point(NamedTuple):
            ...     x: int
            ...     y: int = 0
            >>> Point(1), Point(y=2, x=3).y, Point(1, 2) == (1, 2)
            (Point(x=1, y=0), 2, True)
        """
