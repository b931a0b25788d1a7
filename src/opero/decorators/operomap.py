# this_file: src/opero/decorators/operomap.py
"""Define `@operomap`: the pipeline over every item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, ParamSpec, cast

from opero.concurrency.api import build_map_function
from opero.core.options import MapOptions
from opero.decorators.opero import decorator_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.api import MapDecorator

__all__ = ["operomap"]

O = ParamSpec("O")  # noqa: E741 - the options of a decorator


def _typed(kind: Callable[O, MapOptions]) -> MapDecorator[O]:
    return cast("MapDecorator[O]", decorator_of(kind, "operomap", build=build_map_function))


operomap: Final = _typed(MapOptions)
