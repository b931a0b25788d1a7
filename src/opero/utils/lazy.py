# this_file: src/opero/utils/lazy.py
"""Import late: public names of packages, and libraries that an extra brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str,
    modules: Mapping[str, Iterable[str]],
    *,
    gone: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: Name of the package.
        modules: Module → the public names that it holds.
        gone: Name of former versions → what to write instead; asking for one is an `ImportError`.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 - becomes the package's own
        if name not in homes:
            if gone is not None and name in gone:
                raise ImportError(f"{package} has no {name!r} any more: {gone[name]}", name=package)
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807 - becomes the package's own
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__


def load_extra(module: str, extra: str) -> Any:
    """Import a module of a library that an extra of opero brings.

    Raises:
        ModuleNotFoundError: It is not installed; the message is the line to type.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} is not installed: pip install 'opero[{extra}]'", name=error.name
        ) from error
