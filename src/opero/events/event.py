# this_file: src/opero/events/event.py
"""The base of all events: when and where something happened, readable as an object and as a mapping."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from opero.events.run import parent_run_id, run_id

__all__ = ["Event"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    An event also reads like a mapping of its attributes: `event["attempt"]`, `event.get("error")`,
    `dict(event)`. The key "type" tells the kind of event in lower case.

    Attributes:
        function: Qualified name of the decorated function, or the name of what runs (a task, a workflow).
        at: Wall-clock seconds since the epoch.
        run_id: The run that it happened in, None outside of any.
        parent_id: The run that this one is part of.

    Example:
        >>> event = Event(function="fetch")
        >>> event["function"], event.name, event.get("attempt", 0), "attempt" in event
        ('fetch', 'fetch', 0, False)
    """

    type: ClassVar[str] = "event"
    """What `event["type"]` says."""
    quiet: ClassVar[bool] = False
    """Whether only those hear it who ask for its class by name: there are too many of its kind for everybody."""

    function: str
    at: float = field(default_factory=time.time)
    run_id: str | None = field(default_factory=run_id)
    parent_id: str | None = field(default_factory=parent_run_id)

    def __init_subclass__(cls) -> None:
        # Not `super()`: a dataclass with slots is made twice, and the first class is gone.
        if "type" not in vars(cls):
            cls.type = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @property
    def name(self) -> str:
        """The name of what runs; the same as `function`."""
        return self.function

    # --- as a mapping ------------------------------------------------------------------------------------------------

    def keys(self) -> tuple[str, ...]:
        """Names of what the event tells, "type" first."""
        return ("type", *(f.name for f in fields(self)))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, `default` if the event has none of that name."""
        return self[key] if key in self.keys() else default

    def items(self) -> list[tuple[str, Any]]:
        """Return names and values."""
        return [(key, self[key]) for key in self.keys()]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())
