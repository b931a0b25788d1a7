# this_file: src/opero/decorators/operomap.py
"""`@operomap`: the pipeline over every item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, ParamSpec, cast

from opero.concurrency.dress import mapped
from opero.core.options import MapOptions
from opero.decorators.opero import decorator_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.protocols import MapDecorator

__all__ = ["operomap"]

O = ParamSpec("O")  # noqa: E741 - the options of a decorator


def _typed(kind: Callable[O, MapOptions]) -> MapDecorator[O]:
    return cast("MapDecorator[O]", decorator_of(kind, "operomap", dress=mapped))


operomap: Final = _typed(MapOptions)
