# this_file: src/opero/decorators/__init__.py
"""The two decorators."""

from __future__ import annotations

from opero.decorators.opero import opero
from opero.decorators.operomap import operomap

__all__ = ["opero", "operomap"]
