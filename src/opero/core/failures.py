# this_file: src/opero/core/failures.py
"""Report failed calls: earlier errors are chained behind the last one, and a note says what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from opero import events
from opero.core.deadline import overdue
from opero.errors import (
    DeadlineError,
    RateLimitPausedError,
    RefusalError,
    Rejected,
    SpendCapError,
    is_final,
)
from opero.utils import ambient
from opero.utils.lazy import NamedTuple
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.core.call import Call, FailedCall
    from opero.core.function import FunctionInfo, Stats
    from opero.events.bus import Emitter


_KEY = "__opero_marks__"


class Inner(NamedTuple):
    """How an opero function within another one came to its end.

    Attributes:
        name: Its name.
        attempts: Attempts that it made.
        calls: Real calls that it made.
    """

    name: str
    attempts: int
    calls: int


class _Mark(NamedTuple):
    """What the last call of one function left on an error that ended it, or on a cause of that error.

    Attributes:
        owner: The function.
        note: Its note.
        earlier: The errors before this one.
        inner: How its call came to its end; None on a cause.
        link: The error that it put into the context's place, and what stood there before; None if none.
    """

    owner: str
    note: str = ""
    earlier: tuple[BaseException, ...] = ()
    inner: Inner | None = None
    link: tuple[BaseException, BaseException | None] | None = None


class _Marks(tuple[Any, ...]):
    """What opero left on an error, outermost function first.

    It stays behind when the error is pickled: earlier errors might not survive that, and where it
    is read there may be no opero.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (tuple, ())


def failures(error: BaseException) -> list[BaseException]:
    """Return all errors of the call that `error` ended, in order, itself last.

    Errors of nested opero calls are included. An error that opero never saw is the only one in its list.

    Example:
        >>> from opero import failures, opero
        >>> @opero(cache=False, retries=1, min_delay=0)
        ... def broken():
        ...     raise ConnectionError("no route")
        >>> try:
        ...     broken()
        ... except ConnectionError as error:
        ...     len(failures(error))
        2
    """
    return _collected(error, set())


def _collected(error: BaseException, seen: set[int]) -> list[BaseException]:
    seen.add(id(error))
    found: list[BaseException] = []
    for mark in _marks(error):
        for earlier in mark.earlier:
            if id(earlier) not in seen:
                found += _collected(earlier, seen)
    return [*found, error]


def read_marks(
    error: BaseException,
) -> list[tuple[str, str, tuple[BaseException, ...], Inner | None]]:
    """Return what opero left on an error, for a copy of it in another process: see `restore_marks`."""
    return [mark[:4] for mark in _marks(error) if mark.inner is not None]


def restore_marks(
    error: BaseException, marks: Iterable[tuple[str, str, tuple[BaseException, ...], Inner | None]]
) -> None:
    """Leave on the copy of an error what `read_marks` has read, with copies of the earlier errors."""
    try:
        _set_marks(error, [_Mark(*mark) for mark in marks])
    except Exception:  # noqa: BLE001, S110 - a class may refuse anything
        pass


def inner_of(error: BaseException, owner: str) -> Inner | None:
    """Return which other opero function has retried in vain, and ended with this very error.

    Args:
        error: The error of a real call.
        owner: The function that asks.
    """
    for mark in _marks(error):
        if mark.owner != owner and mark.inner is not None and mark.inner.attempts > 1:
            return mark.inner
    return None


def attach(
    error: BaseException,
    name: str,
    text: str,
    earlier: Sequence[BaseException],
    *,
    owner: str,
    attempts: int = 1,
    calls: int = 1,
) -> None:
    """Chain the earlier errors behind `error` and note on it what happened.

    What the same function left on these very objects before (a module may raise one exception
    object again and again) is taken away first, so that nothing
    piles up. An exception that refuses notes or attributes stays as it is.

    Args:
        error: The error that ends the call.
        name: Name of the function, for the note.
        text: The note; empty for none.
        earlier: The errors before it, in order.
        owner: What distinguishes the function from all others.
        attempts: How many it made.
        calls: Real calls in them.
    """
    before = list({id(e): e for e in earlier if e is not error}.values())
    note = f"opero: {name}() {text}" if text else ""
    try:
        for known in (error, *before):
            _forget(known, owner)
        _chain(error, before, owner)
        if note or before:
            mark = _Mark(owner, note, tuple(before), Inner(name, attempts, calls))
            _set_marks(error, [mark, *_marks(error)])
        if note:
            error.add_note(note)
    except Exception:  # noqa: BLE001, S110 - the user's exception matters, the note does not
        pass


def _marks(error: BaseException) -> tuple[_Mark, ...]:
    """Read the marks past the class's own `__getattr__`, which may answer anything."""
    try:
        marks = vars(error).get(_KEY)
    except Exception:  # noqa: BLE001 - a class may refuse anything
        return ()
    return marks if isinstance(marks, tuple) else ()


def _set_marks(error: BaseException, marks: Sequence[_Mark]) -> None:
    if marks:
        vars(error)[_KEY] = _Marks(marks)
    else:
        vars(error).pop(_KEY, None)


def _forget(error: BaseException, owner: str) -> None:
    """Take away what a former call of `owner` left on an error: its note, its earlier errors, the link to them."""
    stale = {mark.note for mark in _marks(error) if mark.owner == owner}
    notes = vars(error).get("__notes__")
    if stale and isinstance(notes, list):
        notes[:] = [note for note in notes if note not in stale]
    # The link may be at the end of the error's own causes, and these may live longer than the error.
    for node in list(_links(error)):
        marks = _marks(node)
        for mark in marks:
            if mark.owner == owner and mark.link is not None and node.__context__ is mark.link[0]:
                _set_context(node, mark.link[1])
        kept = [m for m in marks if m.owner != owner or (node is not error and m.link is None)]
        if len(kept) < len(marks):
            _set_marks(node, kept)


def _chain(last: BaseException, earlier: Sequence[BaseException], owner: str) -> None:
    """Put earlier errors behind the end of each other's own chains, the latest first.

    `raise … from` and the exception that the caller was handling are left in place: the link is made at the end of an
    error's own causes, before the part that it shares with the next one.
    """
    later = last
    for error in reversed(earlier):
        reachable = _reachable(error)
        if id(later) in reachable:
            continue
        node = later
        for link in _links(later):
            if id(link) in reachable:
                break
            node = link
        _set_marks(node, [*_marks(node), _Mark(owner, link=(error, node.__context__))])
        _set_context(node, error)
        later = error


def raise_again(error: BaseException) -> NoReturn:
    """Raise an error that was raised before, and leave its context alone.

    A `raise` statement puts in the context's place what the caller is handling at the moment.
    """
    context = error.__context__
    try:
        raise error
    finally:
        _set_context(error, context)
        # A frame that names an error which passes through it is a reference cycle.
        del error, context


def _set_context(node: BaseException, error: BaseException | None) -> None:
    # Past the class's own `__setattr__`, as the interpreter does it: exceptions may be frozen dataclasses.
    BaseException.__setattr__(node, "__context__", error)


def _links(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error to what lies behind it, as a traceback shows it."""
    seen: set[int] = set()
    node: BaseException | None = error
    while node is not None and id(node) not in seen:
        seen.add(id(node))
        yield node
        node = node.__context__ if node.__cause__ is None else node.__cause__


def _reachable(error: BaseException) -> set[int]:
    """Identities of all that is behind an error, along causes and contexts: a link back to any of it is a cycle."""
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        node = ahead.pop()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            ahead += (node.__cause__, node.__context__)
    return seen


def story(call: Call, owner: str = "") -> str:
    """Describe in a few lines how a call failed, without any argument value.

    Args:
        call: The call.
        owner: The function, as against other opero functions that it calls.
    """
    failed = call.failures or []
    begin, after = (
        (call.first_failed, " after the first failure")
        if call.started is None
        else (call.started, "")
    )
    seconds = 0.0 if begin is None else round(ambient.clock().monotonic() - begin, 3)
    length = format_seconds(seconds)
    took = "" if not seconds else f", {length}{after}" if after else f" in {length}"
    lines = [f"gave up after {_many(call.attempts, 'attempt')}, {_many(call.calls, 'call')}{took}"]
    for label in dict.fromkeys(f.label for f in failed):
        kinds = Counter(_kind(f.error) for f in failed if f.label == label)
        causes = ", ".join(f"{kind} ×{n}" for kind, n in kinds.items())
        lines.append(f"  {label}: {causes}" if label else f"  {causes}")
    within = [found for f in failed if (found := inner_of(f.error, owner)) is not None]
    for name in dict.fromkeys(found.name for found in within):
        made = [found.calls for found in within if found.name == name]
        lines.append(
            f"  within it {name}() had retried too, and gave up {_many(len(made), 'time')} "
            f"after {_many(sum(made), 'call')} in all"
        )
    return "\n".join(lines)


def _kind(error: Exception) -> str:
    return "rejected result" if isinstance(error, Rejected) else type(error).__name__


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


class Report:
    """Reports how calls of one function have ended.

    Args:
        info: The function.
        retried: Whether failures are retried, so that a single failed call deserves an explanation.
        needs_start: Whether the clock must be read before the first attempt, because `stop` may ask for the time
            spent.
    """

    def __init__(
        self,
        info: FunctionInfo,
        stats: Stats,
        emitter: Emitter,
        *,
        retried: bool,
        needs_start: bool,
    ) -> None:
        self.info = info
        self.stats = stats
        self.emitter = emitter
        self._retried = retried
        self.needs_start = needs_start

    def conclude(self, call: Call, error: Exception) -> None:
        """Report a call that ends with `error`, and raise what its caller gets instead, if it is another error."""
        instead = self.failed(call, error)
        try:
            if instead is not None:
                raise_again(instead)
        finally:
            # A frame that names an error which passes through it is a reference cycle.
            del instead, error

    def failed(self, call: Call, error: Exception) -> Exception | None:
        """Report a call that ends with `error`: chain what came before, add the note, count, notify.

        Returns:
            What the caller gets instead: where a stage refused to go on after real calls had failed,
            the last call's own error. None if it is `error` itself.
        """
        if isinstance(error, Rejected):
            # A result is returned in the end, and its receipt has the errors on the way.
            return None
        made = call.failures or []
        real = [f.error for f in made if not isinstance(f.error, Rejected)]
        refused = isinstance(error, RefusalError) and is_final(error, real)
        # A caller that has to stop must be able to catch that.
        ends = isinstance(error, SpendCapError | RateLimitPausedError)
        final = real[-1] if refused and real and not ends else error
        if refused and isinstance(error, DeadlineError):
            overdue(call, self.emitter, "before the call")
        if made:
            text = self._text(call, made, error, refused=refused and not ends)
            attach(
                final,
                self.info.name,
                text,
                [e for e in real if e is not final],
                owner=self.info.owner,
                attempts=call.attempts,
                calls=call.calls,
            )
        self.stats.add(gave_up=1)
        if self.emitter.active:
            self.emitter.emit(
                events.CallGaveUp(
                    attempts=call.attempts, calls=call.calls, error=final, seconds=call.elapsed()
                )
            )
        return None if final is error else final

    def _text(self, call: Call, made: list[FailedCall], error: Exception, *, refused: bool) -> str:
        """Write the note; nothing where there is nothing to add to the error."""
        # Where a user's `stop` decides, a single failure may have been enough for it.
        final = is_final(error, [f.error for f in made])
        single = len(made) == 1 and self._retried and not final and not ambient.disabled()
        if call.items and len(made) == 1:
            return f"failed after {_many(call.items, 'item')} of the stream"
        if len(made) > 1 or refused or (single and self.needs_start):
            text = story(call, self.info.owner)
            if call.items:
                call.remark = f"{_many(call.items, 'item')} of the stream had come"
            end = f"then {type(error).__name__}: {error}" if refused else call.remark
            return f"{text}\n  {end}" if end else text
        if single:
            kind = type(error).__name__
            return f"was not retried: {call.remark or f'{kind} is not what retry_on asks for'}"
        return ""

    def stream_ended(self, call: Call, error: BaseException | None) -> None:
        """Report a plain generator whose first item was out long ago."""
        if isinstance(error, Exception):
            self.failed(call, error)
        elif error is None:
            self.succeeded(call)

    def succeeded(self, call: Call) -> None:
        """Notify listeners of a value that was computed."""
        if self.emitter.active:
            self.emitter.emit(
                events.CallSucceeded(
                    attempts=call.attempts, calls=call.calls, seconds=call.elapsed()
                )
            )
