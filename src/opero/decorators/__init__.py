# this_file: src/opero/decorators/__init__.py
"""The two decorators."""

from __future__ import annotations

from opero.decorators.opero import opero

__all__ = ["opero"]
