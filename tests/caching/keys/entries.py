# this_file: tests/caching/keys/entries.py
"""A cached function that shows which arguments share an entry."""

from __future__ import annotations

import itertools
from typing import Any

from opero import opero

_numbers = itertools.count()


@opero(cache=True, retries=0)
def entry(value: Any) -> int:
    """Return the number of the entry that the cache has for an argument."""
    return next(_numbers)
