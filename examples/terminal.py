# this_file: examples/terminal.py
"""Plain text for the examples: headings, tables and a list of claims, at most 100 columns wide."""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Sequence

WIDTH = 100


def use_utf8() -> None:
    """Print UTF-8 whatever the terminal or pipe was set to, so that no sign can fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def heading(text: str) -> None:
    """Print a section's title with a line under it."""
    print(f"\n{text}\n{'─' * len(text)}")


def say(text: str) -> None:
    """Print a paragraph, wrapped."""
    print(textwrap.fill(" ".join(text.split()), WIDTH))


def indented(text: str) -> None:
    """Print lines as they are, two columns to the right; too long ones go on a little deeper."""
    for line in text.strip("\n").splitlines():
        deeper = f"│{' ' * 14}" if line.startswith("├") else " " * 4
        folded = textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent=f"  {deeper}")
        print("\n".join(folded))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    """Print rows under a head; the columns named in `numbers` are set flush right, and the last one is folded."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    widths[-1] = min(widths[-1], WIDTH - sum(widths[:-1]) - 2 * len(widths))
    right = [title in numbers for title in head]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, right, strict=True)
        ]
        return "  " + "  ".join(padded).rstrip()

    print(line(head))
    print(line(["─" * width for width in widths]))
    for *cells, last in rows:
        first, *further = textwrap.wrap(last, widths[-1]) or [""]
        print(line([*cells, first]))
        for part in further:
            print(line([*("" for _ in cells), part]))


class Claims:
    """Statements that are checked as they are printed; a demo fails when one of them does.

    Example:
        >>> claims = Claims()
        >>> claims.check("one and one is two", 1 + 1 == 2)
          ✓ one and one is two
        >>> claims.failed
        0
    """

    def __init__(self) -> None:
        self.checked = 0
        self.failed = 0

    def check(self, text: str, holds: bool) -> None:
        """Print a claim and whether it holds."""
        self.checked += 1
        self.failed += not holds
        lines = textwrap.wrap(" ".join(text.split()), WIDTH - 4)
        print(f"  {'✓' if holds else '✗'} " + "\n    ".join(lines))

    def finish(self, seconds: float) -> int:
        """Print the verdict; return the exit code: 0 if all claims hold, else 1."""
        held = self.checked - self.failed
        print(f"\n{held} of {self.checked} claims hold, {seconds:.1f} s.")
        return 1 if self.failed else 0
