# this_file: src/opero/utils/named_tuple.py
"""Define tuples with named fields, at a fraction of what `typing.NamedTuple` costs when a program starts."""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any

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
