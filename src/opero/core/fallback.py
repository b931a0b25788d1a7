# this_file: src/opero/core/fallback.py
"""Argument fallback: try the values of one parameter in order until a call succeeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from opero import events
from opero.core.call import part_key
from opero.core.deadline import overdue
from opero.core.function import used_up
from opero.core.options import standalone
from opero.errors import (
    OperoUsageError,
    RateLimitPausedError,
    RefusalError,
    Rejected,
    is_final,
    matches,
)
from opero.utils import ambient
from opero.utils.parameters import POSITIONAL_OR_KEYWORD, NoDefault
from opero.utils.secrets import looks_secret, show_value
from opero.utils.units import parse_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.core.circuit_breaker import Circuit
    from opero.core.decorated import Decorate
    from opero.core.function import FunctionInfo, Stats
    from opero.core.options import Options
    from opero.events.bus import Emitter
    from opero.utils.parameters import Parameter

_SEVERAL: Final = (list, tuple)

_MOST: Final = 1000
"""Values that are remembered; beyond it the one that is ready soonest is forgotten."""


class Cooldowns:
    """Until when each of the values of one function is skipped.

    Attributes:
        until: Clock readings by value. The success path only asks whether there are any.

    Example:
        >>> resting = Cooldowns()
        >>> resting.begin("gpt-4", 0, until=15.0)
        >>> resting.left("gpt-4", 0, now=10.0), resting.left("gpt-3.5", 1, now=10.0)
        (5.0, 0.0)
    """

    __slots__ = ("_lock", "until")

    def __init__(self) -> None:
        self.until: dict[Hashable, float] = {}
        self._lock = Lock()

    def begin(self, value: object, index: int, until: float) -> None:
        """Leave a value alone until a clock reading, or longer if it is so already."""
        key = part_key(value, index)
        with self._lock:
            if len(self.until) >= _MOST and key not in self.until:
                del self.until[min(self.until, key=self.until.__getitem__)]
            self.until[key] = max(until, self.until.get(key, until))

    def left(self, value: object, index: int, now: float) -> float:
        """Return the seconds for which a value is still left alone."""
        key = part_key(value, index)
        until = self.until.get(key)
        if until is None:
            return 0.0
        if until > now:
            return until - now
        with self._lock:
            if self.until.get(key) == until:
                del self.until[key]
        return 0.0

    def __len__(self) -> int:
        return len(self.until)


# --- decisions -------------------------------------------------------------------------------------------------------


def values_of(given: object, name: str) -> tuple[Any, ...]:
    """Return the values to try in order.

    A list or tuple holds them; anything else, a str too, is the single value.

    Raises:
        OperoUsageError: An empty list: there is nothing to call the function with.

    Example:
        >>> values_of(["gpt-4", "gpt-3.5"], "model"), values_of("gpt-4", "model")
        (('gpt-4', 'gpt-3.5'), ('gpt-4',))
    """
    if not isinstance(given, list | tuple):
        return (given,)
    if not given:
        raise OperoUsageError(
            f"arg_fallback={name!r}: the list of values is empty; give at least one value of {name!r}."
        )
    return tuple(given)


EXHAUSTED_SECONDS: Final = 900.0
"""Seconds for which a value is skipped whose service says that its budget is spent."""


# --- stage -----------------------------------------------------------------------------------------------------------


class ArgFallback:
    """The stage: makes one call for each value until one succeeds; the last error is the attempt's."""

    name = "fallback"

    def __init__(
        self, info: FunctionInfo, options: Options, stats: Stats, emitter: Emitter
    ) -> None:
        name = options.arg_fallback or ""
        self._info = info
        parameter = info.require_parameter(name, "arg_fallback")
        positional = [p.name for p in info.parameters if p.kind <= POSITIONAL_OR_KEYWORD]
        self.parameter: Parameter = parameter
        self._place = positional.index(name) if name in positional else None
        self.secret: bool = looks_secret(name, tuple(options.secret))
        self._fallback_on = options.fallback_on
        self._classifies = isinstance(options.retry_on, str)
        self._stats = stats
        self._emitter = emitter
        self.circuit: Circuit | None = None
        """Refuses values for a time. The pipeline sets it, because the circuit asks for labels in turn."""
        self.cooldowns: Cooldowns = Cooldowns()
        """Values whose service asked to wait; shared by all variants of the function."""
        self._longest_cooldown = parse_seconds(options.retry_after_max, "retry_after_max")
        if parameter.default is not NoDefault:
            values_of(parameter.default, name)

    def describe(self) -> str:
        """Return the line for `explain()`."""
        name, default = self.parameter.name, self.parameter.default
        if default is NoDefault:
            return f"{name}: the values of the list that the caller gives, in order"
        values = values_of(default, name)
        shown = (
            show_value(name, n, v, secret=self.secret).removeprefix(f"{name}=")
            for n, v in enumerate(values)
        )
        often = (
            f"up to {len(values)} values per attempt"
            if len(values) > 1
            else "one value; give a list for more"
        )
        return f"{name}: {' → '.join(shown)}, {often}"

    def label(self, call: Call) -> str | None:
        """How the value of a call is shown."""
        if call.value_index is None:
            return None
        return show_value(self.parameter.name, call.value_index, call.value, secret=self.secret)

    def first(self, given: Any) -> Any:
        """Return the value of a first call; `NoDefault` where the stage has to look at the values."""
        if not isinstance(given, _SEVERAL):
            return given
        if given and (len(given) == 1 or (self.circuit is None and not self.cooldowns.until)):
            return given[0]
        return NoDefault

    def begin(self, call: Call) -> tuple[tuple[Any, ...], Sequence[int], float]:
        """Return a call's values, the places of those to try now, and how long to wait if there are none.

        Raises:
            CircuitOpenError: The circuits of all values are open.
            RateLimitPausedError: All values cool down, for longer than the call would wait.
        """
        place, args = self._place, call.args
        if place is not None and place < len(args):
            given = args[place]
        else:
            given = call.kwargs.get(self.parameter.name, self.parameter.default)
            if given is NoDefault:
                return (), (), 0.0  # a missing argument is the function's own TypeError, not ours
        whole = type(given) in (tuple, list) and given
        values = tuple(given) if whole else values_of(given, self.parameter.name)
        call.has_alternatives = len(values) > 1
        if call.prior_outcome is not None:
            # A call that is already made goes on with the value that it was made with.
            return values, range(call.value_index or 0, len(values)), 0.0
        if not call.has_alternatives or (
            self.circuit is None and not self.cooldowns.until and call.final_values is None
        ):
            return values, range(len(values)), 0.0
        return values, *self._candidates(call, values)

    def _candidates(self, call: Call, values: tuple[Any, ...]) -> tuple[Sequence[int], float]:
        """Return the places of the values that are neither refused nor cooling, or how long to wait."""
        refused = [self._refuses(value, index) for index, value in enumerate(values)]
        closed = [index for index, wait in enumerate(refused) if wait is None]
        if call.final_values is not None:
            closed = [index for index in closed if index not in call.final_values] or closed
        if not closed and self.circuit is not None:
            raise self.circuit.refusal(wait for wait in refused if wait is not None)
        now = ambient.clock().monotonic()
        left = {index: self.cooldowns.left(values[index], index, now) for index in closed}
        ready = [index for index in closed if not left[index]]
        if ready or ambient.disabled():
            return ready or closed, 0.0
        soonest = min(left.values())
        late = call.deadline is not None and now + soonest >= call.deadline
        if late:
            overdue(call, self._emitter, "waiting for a value that cools down")
        if late or soonest > self._longest_cooldown:
            raise RateLimitPausedError(soonest, f"every value of {self.parameter.name!r}")
        return (), soonest

    def use(
        self, call: Call, index: int, value: object, given: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> None:
        """Put a value into the call; from the second one on this is a fallback."""
        call.value_index = index
        call.value = value
        (args, kwargs), place = given, self._place
        if place is not None and place < len(args):
            call.args = (*args[:place], value, *args[place + 1 :])
        else:
            call.args, call.kwargs = args, {**kwargs, self.parameter.name: value}
        if index and call.prior_outcome is None:
            self._stats.add(fallbacks=1)
            if self._emitter.active:
                shown = show_value(self.parameter.name, index, value, secret=self.secret)
                self._emitter.emit(events.FallbackUsed(value=shown, index=index))

    def _refuses(self, value: object, index: int) -> float | None:
        return None if self.circuit is None else self.circuit.refuses(value, index)

    def failed(self, call: Call, error: Exception) -> None:
        """Note which values need no other call, and let a value cool down whose service asked to wait."""
        if not call.has_alternatives or isinstance(error, RefusalError) or ambient.disabled():
            return
        if not call.failures or call.failures[-1].error is not error:
            return
        # Loaded at the first failure.
        from opero.core.retry_after import requested_wait

        index = call.value_index or 0
        hint = requested_wait(error.value if isinstance(error, Rejected) else error)
        seconds, source = (0.0, "") if hint is None else hint
        if self._classifies:
            from opero.core.classify import classify

            verdict = classify(error)
            if verdict.ends_value:
                call.final_values = {*(call.final_values or ()), index}
            if verdict.kind == "exhausted":
                seconds, source = max(seconds, EXHAUSTED_SECONDS), verdict.reason
        if not seconds:
            return
        self.cooldowns.begin(call.value, index, ambient.clock().monotonic() + seconds)
        if self._emitter.active:
            shown = show_value(self.parameter.name, index, call.value, secret=self.secret)
            self._emitter.emit(events.ValueCooling(value=shown, seconds=seconds, source=source))

    def moves_on(self, call: Call, error: Exception) -> bool:
        """Return whether the next value is tried after this error."""
        if call.items:
            return False  # items of a stream are out already
        skipped = self.circuit is not None and self.circuit.refused_value(call, error)
        if not skipped and (
            is_final(error, call.attempt_errors or ()) or not matches(self._fallback_on, error)
        ):
            return False
        name = self._info.single_use_argument(call.args, call.kwargs)
        if name is not None and not skipped:
            call.remark = used_up(name)
            return False
        return call.deadline is None or self._in_time(call, call.deadline)

    def _in_time(self, call: Call, deadline: float) -> bool:
        if ambient.clock().monotonic() < deadline:
            return True
        call.remark = "the deadline comes before the next value"
        overdue(call, self._emitter, "before the next value")
        return False

    # --- adapters ----------------------------------------------------------------------------------------------------

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""

        def run(call: Call) -> Any:
            given = call.args, call.kwargs
            values, candidates, wait = self.begin(call)
            while wait:
                ambient.clock().sleep(wait)
                call.note_wait(wait, self._stats, self._emitter)
                values, candidates, wait = self.begin(call)
            try:
                for index in candidates:
                    self.use(call, index, values[index], given)
                    try:
                        value = proceed(call)
                        if call.stream is not None:
                            call.stream.at_failure(partial(self.failed, call))
                        return value
                    except Exception as error:
                        self.failed(call, error)
                        if index == candidates[-1] or not self.moves_on(call, error):
                            raise
                return proceed(call)
            finally:
                call.args, call.kwargs = given

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""

        async def run(call: Call) -> Any:
            given = call.args, call.kwargs
            values, candidates, wait = self.begin(call)
            while wait:
                await ambient.clock().asleep(wait)
                call.note_wait(wait, self._stats, self._emitter)
                values, candidates, wait = self.begin(call)
            try:
                for index in candidates:
                    self.use(call, index, values[index], given)
                    try:
                        return await proceed(call)
                    except Exception as error:
                        self.failed(call, error)
                        if index == candidates[-1] or not self.moves_on(call, error):
                            raise
                return await proceed(call)
            finally:
                call.args, call.kwargs = given

        return run


# --- on its own ------------------------------------------------------------------------------------------------------


def get_fallback_decorator(arg_fallback: str | None = None, **options: Any) -> Decorate:
    """Return a decorator that only tries the values of one parameter in order.

    Args:
        arg_fallback: Name of the parameter; None for a decorator that changes nothing.
        options: fallback_on.

    Example:
        >>> @get_fallback_decorator(arg_fallback="divisor")
        ... def divide(x, divisor=(0, 2)):
        ...     return x // divisor
        >>> divide(10)
        5
    """
    made: Decorate = standalone(
        "get_fallback_decorator", "fallback", arg_fallback=arg_fallback, **options
    )
    return made
