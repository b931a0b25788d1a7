# this_file: src/opero/caching/keys/shape.py
"""An object in terms of simpler values, or the news that it has no content."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Final, NamedTuple

_SHOWN_STEPS: Final = 15


class Unkeyable(Exception):  # noqa: N818 - a signal inside opero, not what users catch
    """A value, or a part of it, has no content that a key could be built from.

    Attributes:
        culprit: Type name of the offending part, never its value.
        reason: Why it has no key, as the rest of a sentence that begins with the culprit.
        path: Steps from the encoded value to the part: names, indices, or a placeholder such as
            "<element>". Of many steps the innermost are dropped.

    Example:
        >>> from opero.caching.keys import encode
        >>> try:
        ...     encode({"cfg": [1, object()]})
        ... except Unkeyable as signal:
        ...     print(signal.path, signal.culprit)
        ('cfg', 1) object
    """

    def __init__(self, culprit: str, reason: str = "has no content to build a key from") -> None:
        super().__init__(culprit, reason)
        self.culprit = culprit
        self.reason = reason
        self.path: tuple[str | int, ...] = ()

    def inside(self, step: str | int) -> None:
        """Prepend a step to the path, on the way out of a container.

        Args:
            step: Name or index of the part within its container.
        """
        self.path = (step, *self.path[:_SHOWN_STEPS])

    def __str__(self) -> str:
        where = f"{'.'.join(map(str, self.path))}: " if self.path else ""
        return f"{where}{self.culprit} {self.reason}"


class Shape(NamedTuple):
    """An object in terms of simpler values.

    Attributes:
        tag: What it is: a name of ours, or "module:qualname" of its class. Ours have no colon.
        whole: Content without a name of its own, such as the text of a `str` subclass.
        parts: Named content, such as fields.
    """

    tag: str
    whole: object = None
    parts: Mapping[str, object] = types.MappingProxyType({})


def type_name(kind: type) -> str:
    """Return a type's name for people: "module.qualname", without "builtins"."""
    module, name = kind.__module__, kind.__qualname__
    return name if module == "builtins" else f"{module}.{name}"


def class_tag(kind: type) -> str:
    """Return a class's name for keys: "module:qualname", the script always being `__main__`."""
    return f"{module_name(kind.__module__)}:{kind.__qualname__}"


def module_name(name: str) -> str:
    """Return a module's name for keys."""
    # A spawned worker imports the script under another name.
    return "__main__" if name == "__mp_main__" else name
