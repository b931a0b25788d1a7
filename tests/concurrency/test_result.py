# this_file: tests/concurrency/test_result.py
"""How the result of a map shows itself."""

from __future__ import annotations

import pickle

import pytest

from opero.concurrency import MapFailure, MapResult
from opero.errors import MapStopped


def result_of(failed: int = 0, **fields: object) -> MapResult[int]:
    failures = [
        MapFailure(index=n, item="secret", error=KeyError(f"<{n}>"), attempts=4)
        for n in range(failed)
    ]
    given = {"values": [1, 2], "indices": [7, 8], "total": 2 + failed, "seconds": 1.5, **fields}
    return MapResult(failures=failures, **given)  # type: ignore[arg-type]


def test_a_complete_one_is_one_line() -> None:
    assert repr(result_of(hits=1)) == "<MapResult complete: 2 of 2 done, 1 cached, in 1.5 s>"
    assert result_of().ok


def test_failures_are_named_but_not_their_items() -> None:
    shown = repr(result_of(failed=7)).splitlines()
    assert shown[0] == "<MapResult complete: 2 of 9 done, 7 failed, in 1.5 s"
    assert shown[1] == "  item 0: KeyError: '<0>'"
    assert shown[-1] == "  … and 2 more>"
    assert "secret" not in repr(result_of(failed=7).failures)


def test_a_stopped_one_says_so_and_raises() -> None:
    stopped = result_of(status="stopped", reason="too many", total=None)
    assert repr(stopped) == "<MapResult stopped: 2 of 2 done, in 1.5 s; too many>"
    assert not stopped.ok
    with pytest.raises(MapStopped, match="too many") as raised:
        stopped.raise_on_failure()
    assert raised.value.result is stopped


def test_in_a_notebook_it_is_a_table_without_markup_of_others() -> None:
    shown = result_of(failed=1)._repr_html_()
    assert "<table>" in shown
    assert "&lt;0&gt;" in shown
    assert "<table>" not in result_of()._repr_html_()


def test_it_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(result_of(failed=1)))
    assert again.by_index() == {7: 1, 8: 2}
    assert str(pickle.loads(pickle.dumps(MapStopped("why", again)))) == "why"
