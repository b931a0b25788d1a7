# this_file: src/opero/cli/output.py
"""Format facts as columns of text or as JSON, with secrets masked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from opero.utils.secrets import looks_secret, mask_text

__all__ = ["as_json", "as_size", "as_table"]


def as_table(rows: Iterable[Sequence[object]], *, indent: str = "") -> str:
    """Return rows as left-aligned columns, two spaces apart, with secrets masked; the last column may be of any length.

    Example:
        >>> print(as_table([("name", "entries"), ("geo", 12)]))
        name  entries
        geo   12
    """
    cells = [[mask_text(str(cell)) for cell in row] for row in rows]
    columns = max((len(row) for row in cells), default=0)
    widths = [
        max((len(row[n]) for row in cells if n < len(row)), default=0) for n in range(columns)
    ]
    lines = (
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def as_size(n_bytes: int | None) -> str:
    """Return a number of bytes in a readable unit.

    Example:
        >>> as_size(999), as_size(1_500_000), as_size(None)
        ('999 B', '1.5 MB', '?')
    """
    if n_bytes is None:
        return "?"
    size, units = float(n_bytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def as_json(facts: object) -> str:
    """Return facts as indented JSON, with secrets masked."""
    return json.dumps(_masked(facts), indent=2, ensure_ascii=False)


def _masked(facts: Any, name: str = "") -> Any:
    if isinstance(facts, str):
        return "***" if looks_secret(name) else mask_text(facts)
    if isinstance(facts, dict):
        return {key: _masked(value, str(key)) for key, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_masked(item, name) for item in facts]
    return facts
