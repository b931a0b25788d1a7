# this_file: tests/core/test_failures.py
"""What a final error tells: the earlier errors behind it, `failures()`, and nothing twice."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from opero import failures, opero
from opero.testing import flaky

quick: dict[str, Any] = {"cache": False, "min_delay": 0}


def chain_of(error: BaseException) -> list[BaseException]:
    """What a traceback shows behind an error; fails on a cycle along causes and contexts."""
    found: list[BaseException] = []
    node: BaseException | None = error
    while node is not None:
        assert all(node is not known for known in found), "the chain is a circle"
        found.append(node)
        node = (
            node.__cause__
            if node.__cause__ is not None or node.__suppress_context__
            else node.__context__
        )
    assert_no_cycle(error)
    return found


def assert_no_cycle(error: BaseException, above: tuple[int, ...] = ()) -> None:
    assert id(error) not in above
    for orphan_thread in (error.__cause__, error.__context__):
        if orphan_thread is not None:
            assert_no_cycle(orphan_thread, (*above, id(error)))


def raising(*errors: BaseException) -> Callable[..., Any]:
    """A body that raises the given objects one after the other, again and again."""
    turn = 0

    def body(model: str = "a") -> None:
        nonlocal turn
        turn += 1
        raise errors[(turn - 1) % len(errors)]

    return body


def caught(face: Any, begin: Callable[..., Any], *args: Any) -> Exception:
    try:
        face.run(begin, *args)
    except Exception as error:  # noqa: BLE001 - any error may be asked for
        return error
    raise AssertionError("nothing was raised")


def caught_while_handling(face: Any, handled: Exception, begin: Callable[..., Any]) -> Exception:
    """The same for a caller in an `except` block; `asyncio.run` is a caller too, hence a task."""

    async def in_a_task() -> None:
        try:
            raise handled
        except type(handled):
            await begin()

    def plainly() -> None:
        try:
            raise handled
        except type(handled):
            begin()

    return caught(face, in_a_task if face.asynchronous else plainly)


# --- the object that comes out --------------------------------------------------------------------


def test_the_last_calls_own_object_comes_out(face: Any) -> None:
    errors = [ConnectionError(n) for n in range(4)]
    assert caught(face, opero(**quick)(face.of(raising(*errors)))) is errors[3]


@pytest.mark.parametrize("values", ["a", ["a", "b", "c"]], ids=["one value", "three values"])
def test_its_type_is_the_same_with_one_value_and_with_three(face: Any, values: Any) -> None:
    class RateLimitError(Exception):
        pass

    def body(model: str) -> None:
        raise RateLimitError(model)

    error = caught(face, opero(arg_fallback="model", **quick)(face.of(body)), values)
    assert type(error) is RateLimitError
    assert error.args == (values[-1],)


def test_without_a_failure_before_it_the_error_is_untouched(face: Any) -> None:
    error = caught(face, opero(cache=False, retries=0)(face.of(raising(ValueError()))))
    assert vars(error) == {}
    assert error.__context__ is None


# --- the chain ------------------------------------------------------------------------------------


def test_earlier_errors_are_chained_in_order(face: Any) -> None:
    errors = [ConnectionError(n) for n in range(4)]
    error = caught(face, opero(**quick)(face.of(raising(*errors))))
    assert chain_of(error) == errors[::-1]
    assert failures(error) == errors


def test_values_and_attempts_are_chained_in_order(face: Any) -> None:
    errors = [ConnectionError(n) for n in range(6)]
    fetch = opero(arg_fallback="model", retries=1, **quick)(face.of(raising(*errors)))
    error = caught(face, fetch, ["a", "b", "c"])
    assert chain_of(error) == errors[::-1]
    assert failures(error) == errors


def test_a_cause_of_the_users_stays_where_it_is(face: Any) -> None:
    def body() -> None:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner

    error = caught(face, opero(retries=1, **quick)(face.of(body)))
    assert [type(e) for e in chain_of(error)] == [ValueError, KeyError, ValueError, KeyError]
    assert isinstance(error.__cause__, KeyError)


def test_a_context_of_the_users_stays_where_it_is(face: Any) -> None:
    def body() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904 - the implicit context is what is tested

    error = caught(face, opero(retries=1, **quick)(face.of(body)))
    assert [type(e) for e in chain_of(error)] == [ValueError, KeyError, ValueError, KeyError]


def test_from_none_still_hides_what_is_behind(face: Any) -> None:
    def body() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer") from None

    error = caught(face, opero(retries=1, **quick)(face.of(body)))
    assert chain_of(error) == [error]
    assert len(failures(error)) == 2
    assert "KeyError" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("context", [False, True], ids=["plain", "with a context"])
@pytest.mark.parametrize("wanted", [Exception, KeyError], ids=["retried", "not retried"])
def test_what_the_caller_was_handling_stays_at_the_end(
    face: Any, retries: int, context: bool, wanted: Any
) -> None:
    warm = True

    def body() -> None:
        if warm:
            return
        if not context:
            raise ValueError("outer")
        try:
            raise LookupError("inner")
        except LookupError:
            raise ValueError("outer")  # noqa: B904 - the implicit context is what is tested

    fetch = opero(retries=retries, retry_on=wanted, **quick)(face.of(body))
    # The first result opens the fast path, whose first call is made outside the stages.
    face.run(fetch)
    warm = False
    handled = OSError("the caller's")
    error = caught_while_handling(face, handled, fetch)
    calls = retries + 1 if wanted is Exception else 1
    expected = [ValueError, LookupError] * calls if context else [ValueError] * calls
    assert [type(e) for e in chain_of(error)] == [*expected, OSError]
    assert handled.__context__ is None


def test_an_error_raised_from_the_one_before_makes_no_circle(face: Any) -> None:
    first: list[ValueError] = []

    def body() -> None:
        error = ValueError(len(first))
        first.append(error)
        raise error from (first[-2] if len(first) > 1 else None)

    error = caught(face, opero(**quick)(face.of(body)))
    assert chain_of(error) == first[::-1]
    assert failures(error) == first


def test_a_context_hidden_by_a_cause_makes_no_circle(face: Any) -> None:
    again = ConnectionError("raised twice")

    def body(model: str) -> None:
        try:
            raise again
        except ConnectionError:
            if model == "a":
                raise ValueError("wrapped") from KeyError("cause")
            raise

    fetch = opero(arg_fallback="model", retries=0, **quick)(face.of(body))
    error = caught(face, fetch, ["a", "b"])
    assert error is again
    chain_of(error)
    assert [type(e) for e in failures(error)] == [ValueError, ConnectionError]


def test_a_cause_that_is_false_is_a_cause(face: Any) -> None:
    def body() -> None:
        raise ValueError from EmptyError()

    error = caught(face, opero(retries=1, **quick)(face.of(body)))
    assert [type(e) for e in chain_of(error)] == [ValueError, EmptyError, ValueError, EmptyError]


def test_two_errors_with_one_cause_make_no_circle(face: Any) -> None:
    cause = KeyError("shared")

    def body() -> None:
        raise ValueError from cause

    error = caught(face, opero(**quick)(face.of(body)))
    chain_of(error)
    assert len(failures(error)) == 4


# --- one object raised again and again ------------------------------------------------------------


def size_of(error: BaseException) -> tuple[int, int, int]:
    return len(getattr(error, "__notes__", ())), len(failures(error)), len(chain_of(error))


@pytest.mark.parametrize(
    "make",
    [
        lambda always: (always,),
        lambda always: (ValueError, always),
        lambda always: (always, ValueError, always),
        lambda always: (ValueError, always, KeyError, always),
    ],
    ids=["alone", "last", "first and last", "twice"],
)
def test_on_a_singleton_nothing_piles_up(face: Any, make: Any) -> None:
    always = ConnectionError("the module's own")
    kinds = make(always)

    def body(model: int) -> None:
        kind = kinds[model]
        raise kind if isinstance(kind, Exception) else kind()

    fetch = opero(arg_fallback="model", retries=1, **quick)(face.of(body))
    sizes = set()
    for _ in range(20 if face.asynchronous else 100):
        assert caught(face, fetch, list(range(len(kinds)))) is always
        sizes.add(size_of(always))
    assert len(sizes) == 1


def test_a_singleton_in_the_middle_gathers_nothing(face: Any) -> None:
    always = ConnectionError("the module's own")

    def body(model: int) -> None:
        raise (ValueError(), always, KeyError())[model]

    fetch = opero(arg_fallback="model", retries=1, **quick)(face.of(body))
    for _ in range(5):
        error = caught(face, fetch, [0, 1, 2])
        assert [type(e) for e in failures(error)] == [
            ValueError, ConnectionError, KeyError, ValueError, KeyError
        ]  # fmt: skip
        chain_of(error)
    assert not hasattr(always, "__notes__")


def test_a_cause_that_lives_on_gathers_nothing(face: Any) -> None:
    cause = OSError("why the client is closed")

    def body(model: int) -> None:
        raise ValueError(model) from (cause if model else None)

    fetch = opero(arg_fallback="model", retries=0, **quick)(face.of(body))
    lengths = {len(chain_of(caught(face, fetch, [0, 1]))) for _ in range(10)}
    assert lengths == {3}


def test_two_singletons_that_take_turns_make_no_circle(face: Any) -> None:
    errors = ConnectionError("a"), TimeoutError("b")

    def body(model: int) -> None:
        raise errors[model]

    fetch = opero(arg_fallback="model", retries=0, **quick)(face.of(body))
    for _ in range(3):
        for order in ([0, 1], [1, 0]):
            error = caught(face, fetch, order)
            assert failures(error) == [errors[n] for n in order]
            assert chain_of(error) == [errors[n] for n in order[::-1]]


def test_two_functions_with_two_singletons_make_no_circle(face: Any) -> None:
    errors = ConnectionError("a"), TimeoutError("b")

    def fetch(model: int) -> None:
        raise errors[model]

    def load(model: int) -> None:
        raise errors[model]

    options = {"arg_fallback": "model", "retries": 0, **quick}
    assert failures(caught(face, opero(**options)(face.of(fetch)), [0, 1])) == [*errors]
    error = caught(face, opero(**options)(face.of(load)), [1, 0])
    assert failures(error) == [errors[1], errors[0]]
    chain_of(error)


def test_a_cause_that_lives_on_gets_its_own_context_back(face: Any) -> None:
    root, cause = OSError("root"), KeyError("cause")
    cause.__context__ = root

    def body(model: int) -> None:
        raise ValueError(model) from (cause if model else root)

    fetch = opero(arg_fallback="model", retries=0, **quick)(face.of(body))
    assert len(chain_of(caught(face, fetch, [0, 1]))) == 4
    assert chain_of(caught(face, fetch, [1]))[1:] == [cause, root]


def test_a_singleton_that_two_functions_raise_keeps_one_note_of_each(face: Any) -> None:
    always = ConnectionError("the module's own")

    def fetch() -> None:
        raise always

    def load() -> None:
        raise always

    for _ in range(3):
        caught(face, opero(**quick)(face.of(fetch)))
        caught(face, opero(**quick)(face.of(load)))
    assert [note.split("()")[0] for note in always.__notes__] == ["opero: fetch", "opero: load"]


def test_a_note_of_the_users_is_kept() -> None:
    always = ConnectionError("the module's own")
    always.add_note("ask Bob")
    fetch = opero(**quick)(raising(always))
    for _ in range(2):
        with pytest.raises(ConnectionError):
            fetch()
    assert always.__notes__[0] == "ask Bob"
    assert len(always.__notes__) == 2


# --- opero functions within opero functions -------------------------------------------------------


def test_nested_functions_both_leave_their_notes(face: Any) -> None:
    fetch = opero(retries=2, **quick)(raising(*(ConnectionError(n) for n in range(99))))

    def report() -> None:
        fetch()

    report = opero(retries=1, **quick)(face.of(report))
    error = caught(face, report)
    notes = [note.splitlines()[0].partition(",")[0] for note in error.__notes__]
    assert notes == [
        "opero: body() gave up after 3 attempts", "opero: report() gave up after 2 attempts"
    ]  # fmt: skip


def test_nested_functions_tell_all_failures_in_order(face: Any) -> None:
    fetch = opero(retries=2, **quick)(raising(*(ConnectionError(n) for n in range(99))))

    def report() -> None:
        fetch()

    report = opero(retries=1, **quick)(face.of(report))
    error = caught(face, report)
    assert [e.args[0] for e in failures(error)] == list(range(6))
    assert [e.args[0] for e in chain_of(error)] == list(reversed(range(6)))


def test_nested_functions_of_one_name_both_leave_their_notes() -> None:
    class Client:
        @opero(retries=1, **quick)
        def fetch(self) -> None:
            raise ConnectionError

    @opero(retries=1, **quick)
    def fetch() -> None:
        Client().fetch()

    with pytest.raises(ConnectionError) as got:
        fetch()
    assert len(got.value.__notes__) == 2
    assert len(failures(got.value)) == 4


def test_nothing_piles_up_behind_a_cause_that_two_functions_share() -> None:
    cause = KeyError("made once")

    def body() -> None:
        raise ConnectionError from cause

    def other() -> None:
        body()

    for fetch in [opero(retries=1, **quick)(body), opero(retries=1, **quick)(other)] * 3:
        with pytest.raises(ConnectionError) as got:
            fetch()
        assert len(got.value.__notes__) == 1
        assert len(failures(got.value)) == 2
        assert len(chain_of(got.value)) <= 6


def test_failures_of_an_error_that_opero_never_saw_is_itself() -> None:
    error = ValueError()
    assert failures(error) == [error]


# --- exceptions that are not like others ----------------------------------------------------------


class NoAttributesError(Exception):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"no {name} here")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int = 5


class NoNotesError(Exception):
    def add_note(self, note: str) -> None:
        raise RuntimeError("no notes here")


class NotesAreTextError(Exception):
    __notes__ = "not a list"  # type: ignore[assignment]


class SlottedError(Exception):
    __slots__ = ("code",)


class OwnInitError(Exception):
    def __init__(self, response: object, *, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = response


class EmptyError(Exception):
    def __len__(self) -> int:
        return 0


class NeverEqualError(Exception):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("do not compare me")

    __hash__ = None  # type: ignore[assignment]


class AnswersAnythingError(Exception):
    def __getattr__(self, name: str) -> Any:
        return lambda *args: self


class AnswersNothingError(Exception):
    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class AsksItselfError(Exception):
    def __getattr__(self, name: str) -> Any:
        return self.data[name]


odd: list[Callable[[], Exception]] = [
    NoAttributesError,
    FrozenError,
    NoNotesError,
    NotesAreTextError,
    SlottedError,
    lambda: OwnInitError(object(), status=429),
    EmptyError,
    NeverEqualError,
    AnswersAnythingError,
    AnswersNothingError,
    AsksItselfError,
    lambda: ExceptionGroup("all", [ValueError()]),
    lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    RecursionError,
]


@pytest.mark.parametrize("make", odd, ids=lambda make: type(make()).__name__)
def test_an_odd_exception_comes_out_as_it_is(face: Any, make: Callable[[], Exception]) -> None:
    made: list[Exception] = []

    def body() -> None:
        made.append(make())
        raise made[-1]

    error = caught(face, opero(**quick)(face.of(body)))
    assert len(made) == 4
    assert error is made[-1]
    assert [id(e) for e in failures(error)] == [id(e) for e in made]
    node: BaseException | None = error
    for expected in reversed(made):
        assert node is expected
        node = node.__context__


def test_a_stop_iteration_comes_out_of_a_plain_function() -> None:
    made = [StopIteration(n) for n in range(4)]
    with pytest.raises(StopIteration) as got:
        opero(**quick)(raising(*made))()
    assert got.value is made[3]


@pytest.mark.parametrize(
    "make", [FrozenError, NoNotesError, NotesAreTextError, AnswersNothingError], ids=repr
)
def test_an_exception_that_refuses_notes_has_none_of_ours(make: Any) -> None:
    error = make()
    with pytest.raises(make):
        opero(**quick)(raising(error))()
    assert "opero" not in str(vars(error).get("__notes__", ""))


# --- copies ---------------------------------------------------------------------------------------


def unpicklable() -> ConnectionError:
    error = ConnectionError("with a lambda")
    error.hook = lambda: None  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "again", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_final_error_is_copied_with_its_note_and_without_its_past(face: Any, again: Any) -> None:
    errors = [unpicklable(), ConnectionError("last", 5)]
    error = caught(face, opero(retries=1, **quick)(face.of(raising(*errors))))
    copied = again(error)
    assert (type(copied), copied.args) == (ConnectionError, ("last", 5))
    assert copied.__notes__ == error.__notes__
    assert failures(copied) == [copied]
    assert len(failures(error)) == 2


def test_a_pickled_error_needs_no_opero_to_be_read() -> None:
    with pytest.raises(ConnectionError) as got:
        opero(**quick)(flaky("never", failures=99))()
    assert b"opero.core" not in pickle.dumps(got.value)
