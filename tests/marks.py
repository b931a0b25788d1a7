# this_file: tests/marks.py
"""Decide from its imports whether a test file is internal: whether it uses names that are not documented.

Internal files have the module-level mark `pytest.mark.internal`; `pytest -m "not internal"` runs the rest, which holds
for any implementation of the public names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module

__all__ = ["PUBLIC", "internal_imports", "is_marked"]

_PACKAGES = (
    *("opero", "opero.cli", "opero.concurrency", "opero.core", "opero.decorators", "opero.durable"),
    *("opero.errors", "opero.events", "opero.instrumentation", "opero.tasks", "opero.testing"),
    "opero.utils",
)
"""Packages whose `__all__` is documented."""

PUBLIC: dict[str, set[str]] = {
    **{name: set(import_module(name).__all__) for name in _PACKAGES},
    "opero.concurrency.pool": {"get_parallel_executor", "get_parallel_map_decorator"},
    "opero.core.cache": {"clear_cache", "get_cache_context", "get_cache_decorator"},
    "opero.core.fallback": {"get_fallback_decorator"},
    "opero.core.rate_limit": {"RateLimiter", "get_rate_limit_decorator"},
    "opero.core.retry": {"get_retry_decorator"},
    "opero.decorators.opero": {"opero"},
    "opero.decorators.operomap": {"operomap"},
    "opero.utils.async_utils": {"ensure_async", "is_async_function", "run_async"},
    "opero.utils.logging": {"ContextAdapter", "configure_logging", "get_logger", "log_context"},
}
"""Module → names that users import from it."""


def internal_imports(tree: ast.Module) -> list[str]:
    """Return the names of opero that a file imports and users do not."""
    found: list[str] = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            found += [name for name in modules if _is_ours(name) and name not in PUBLIC]
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            module = node.module or ""
            for alias in node.names:
                name = f"{module}.{alias.name}"
                public = alias.name in PUBLIC.get(module, ()) or name in PUBLIC
                if not public and name != "opero.__version__":
                    found.append(name)
    return found


def is_marked(tree: ast.Module) -> bool:
    """Return whether a file sets the mark for all its tests."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return "pytest.mark.internal" in ast.unparse(node.value)
    return False


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a block and of the blocks in it; expressions hold no imports."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(node, name, ())
        for statement in block if isinstance(block, list) else ():  # a lambda's is an expression
            yield statement
            yield from _statements(statement)


def _is_ours(module: str) -> bool:
    return module == "opero" or module.startswith("opero.")
