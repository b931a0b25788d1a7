# this_file: tests/events/test_types.py
"""Every kind of event stands in the documentation, and is sent by somebody."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import opero
from opero import events

KINDS = sorted(
    name
    for name in events.__all__
    if isinstance(getattr(events, name), type)
    and issubclass(getattr(events, name), events.Event)
    and name != "Event"
)
SOURCE = "\n".join(
    path.read_text(encoding="utf-8")
    for path in Path(opero.__file__).parent.rglob("*.py")
    if path.parts[-2:] != ("events", "kinds.py")
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_explained(name: str, root: Path) -> None:
    table = (root / "docs" / "events.md").read_text(encoding="utf-8")
    assert re.search(rf"^\|.*`{name}`.*\|", table, re.MULTILINE)


@pytest.mark.parametrize("name", KINDS)
def test_every_event_class_is_sent_somewhere(name: str) -> None:
    assert re.search(rf"\b{name}\($", SOURCE, re.MULTILINE) or re.search(
        rf"(?<!class )\b{name}\(function=", SOURCE
    )
