# this_file: src/opero/core/stage.py
"""The shape that all stages share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Proceed

__all__ = ["Stage"]


class Stage(Protocol):
    """One step: it gets a call and the way on, and returns or raises what the caller shall get."""

    name: str
    """Its name in `explain()`."""

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        ...

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        ...

    def describe(self) -> str:
        """One line for `explain()`: what the stage will do, with its numbers."""
        ...
