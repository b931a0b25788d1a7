# this_file: src/opero/decorators/operomap.py
"""Define `@operomap`: the pipeline over every item."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, ParamSpec, cast

from opero.core.options import MapOptions
from opero.decorators.opero import decorator_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from opero.concurrency.pool import MapDecorator
    from opero.core.pipeline import Pipeline

__all__ = ["operomap"]

O = ParamSpec("O")  # noqa: E741 - the options of a decorator


def _build(pipeline: Pipeline, by: str) -> Any:
    # Loaded with the first map, so that a program without maps does not pay for it.
    from opero.concurrency.mapper import build_map_function

    return build_map_function(pipeline, by)


def _typed(kind: Callable[O, MapOptions]) -> MapDecorator[O]:
    return cast("MapDecorator[O]", decorator_of(kind, "operomap", build=_build))


operomap: Final = _typed(MapOptions)
