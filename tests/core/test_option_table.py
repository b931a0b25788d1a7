# this_file: tests/core/test_option_table.py
"""The one table of options."""

from __future__ import annotations

import dataclasses
import inspect
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.test_options import RIGHT, WRONG
from tests.tables import rows

from opero import opero
from opero.core.options import Options
from opero.errors import OperoUsageError

pytestmark = pytest.mark.internal

NAMES = tuple(Options.declared)
# Of few characters: the table of all of them takes hypothesis half a minute on a busy machine.
TEXTS = st.text(string.printable + "é…", max_size=5)


def test_the_tables_of_values_leave_no_option_out() -> None:
    assert set(WRONG) == set(RIGHT) == set(NAMES)


@given(
    st.sampled_from(NAMES),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        TEXTS,
        st.binary(max_size=5),
        st.lists(st.one_of(st.integers(), TEXTS), max_size=2),
        st.tuples(st.just(ValueError)),
        st.just(object()),
    ),
)
def test_whatever_is_refused_is_refused_by_name(name: str, value: Any) -> None:
    try:
        Options.of("opero", **{name: value})
    except OperoUsageError as error:
        if name not in str(error):
            raise AssertionError("the message does not name the option") from error


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().retries = 5  # type: ignore[misc]


def test_equal_options_are_equal_wherever_they_were_given() -> None:
    assert Options.of("opero", retries=3) == Options()


def test_given_lists_what_was_written_down_even_if_it_is_the_default() -> None:
    assert Options.of("opero", retries=3, cache=True).given == {"retries", "cache"}


def test_replace_keeps_what_was_given_and_adds_what_changes() -> None:
    options = Options.of("opero", retries=5, min_delay=1).replace("opero", retries=7)
    assert (options.retries, options.min_delay) == (7, 1)
    assert options.given == {"retries", "min_delay"}


def test_replace_checks_like_the_constructor() -> None:
    with pytest.raises(OperoUsageError, match=r"opero\(\) has no option 'retires'"):
        Options().replace("opero", retires=1)


@rows("name", NAMES)
def test_every_option_has_a_meaning_a_stage_and_a_default_that_passes_its_check(name: str) -> None:
    option = Options.declared[name]
    option.check(name, option.default)
    assert option.stage
    assert f" {name}: " in (Options.__doc__ or "")
    assert f" {name}: " in (opero.__doc__ or "")


def test_the_decorator_shows_the_options_as_its_parameters() -> None:
    shown = inspect.signature(opero)
    assert tuple(shown.parameters) == NAMES
    assert {p.kind for p in shown.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown.return_annotation is inspect.Signature.empty
