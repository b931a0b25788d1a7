# this_file: tests/tables.py
"""Tables whose rows are one test together.

A row that `pytest.mark.parametrize` makes is a test, which each worker collects and reports: some milliseconds, however
little it does. `rows` stands where there are dozens of rows that need no setting up of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

__all__ = ["rows"]


def rows(
    names: str | tuple[str, ...], values: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with each row, as `parametrize` does, in one test; it tells all rows that fail.

    Args:
        names: Of the parameter, or of several.
        values: For one name its values, for several a tuple for each row.
    """
    columns = (names,) if isinstance(names, str) else names
    table = [(value,) if isinstance(names, str) else tuple(value) for value in values]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            failed: list[BaseException] = []
            for row in table:
                given = dict(zip(columns, row, strict=True))
                try:
                    test(**fixtures, **given)
                except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised below
                    error.add_note(f"row: {given!r:.500}")
                    failed.append(error)
            if failed:
                raise BaseExceptionGroup(f"{len(failed)} of {len(table)} rows", failed)
            assert table, "a table without rows tests nothing"

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in columns]
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate
