# this_file: src/opero/instrumentation/extras.py
"""What to say when a library that a listener needs is not installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["load"]


def load(module: str, extra: str) -> Any:
    """Import a module that an extra of opero brings.

    Raises:
        ModuleNotFoundError: It is not installed; the message is the line to type.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'opero[{extra}]'", name=error.name
        ) from error
