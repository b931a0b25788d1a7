# this_file: src/opero/utils/named_tuple.py
"""Define tuples with named fields, at a tenth of what `typing.NamedTuple` costs when a program starts."""

from __future__ import annotations

from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 - exported
else:
    from collections import _tuplegetter

    class NamedTuple(tuple):
        """What `typing.NamedTuple` is, but made without compiling each annotation and constructor.

        Twenty such classes, and the classes of `ast` that compiling needs, were a fifth of what importing opero costs.

        Example:
            >>> class Point(NamedTuple):
            ...     x: int
            ...     y: int = 0
            >>> Point(1), Point(y=2, x=3).y, Point(1, 2) == (1, 2)
            (Point(x=1, y=0), 2, True)
        """

        __slots__ = ()

        def __init_subclass__(cls) -> None:
            fields = cls._fields = cls.__match_args__ = tuple(cls.__annotations__)
            cls._field_defaults = {name: vars(cls)[name] for name in fields if name in vars(cls)}
            code = _constructor(len(fields)).replace(
                co_varnames=("_cls", *fields), co_qualname=f"{cls.__qualname__}.__new__"
            )
            cls.__new__ = FunctionType(code, {"_new": tuple.__new__}, "__new__")
            cls.__new__.__defaults__ = tuple(cls._field_defaults.values())
            for place, name in enumerate(fields):
                setattr(cls, name, _tuplegetter(place, ""))

        def __getnewargs__(self) -> tuple[Any, ...]:
            """Return what a pickle hands to `__new__`."""
            return tuple(self)

        def _asdict(self) -> dict[str, Any]:
            return dict(zip(self._fields, self, strict=True))

        def _replace(self, **changes: Any) -> Any:
            return type(self)(**(self._asdict() | changes))

        def __repr__(self) -> str:
            fields = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({fields})"


@cache
def _constructor(size: int) -> CodeType:
    """Return the code that makes a tuple of so many fields."""
    names = "".join(f"_{place}, " for place in range(size))
    made: FunctionType = eval(f"lambda _cls, {names}: _new(_cls, ({names}))")  # noqa: S307 - fixed text
    return made.__code__
