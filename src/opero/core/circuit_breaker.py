# this_file: src/opero/core/circuit_breaker.py
"""Ask the circuit breaker before each real call, and report how the call has ended.

`Circuit` stands right before the call. `CircuitCheck` stands before the stages that wait, so that no call queues for a
slot only to be refused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import finalize

from opero.core.call import part_key
from opero.errors import CircuitOpenError
from opero.events import Handler, Subscription
from opero.limits.breaker import CircuitBreaker
from opero.limits.breaker_state import FREE, CircuitState
from opero.utils import ambient
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.core.call import AsyncProceed, Call, Proceed
    from opero.events import CircuitChanged
    from opero.events.bus import Emitter
    from opero.limits.breaker_state import Permit


T = TypeVar("T")

# --- decisions ----------------------------------------------------------------------------------


def breaker_of(option: bool | CircuitBreaker) -> CircuitBreaker:
    """Return the breaker that the option `circuit_breaker` asks for: the given or a new one."""
    return option if isinstance(option, CircuitBreaker) else CircuitBreaker()


# --- stage --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _FunctionListener:
    """One function's listener at a breaker: it gets the events under its function's name.

    Objects of the same listener and function are equal, so that `with_options` does not double it.
    """

    function: str
    listener: Handler
    subscription: Subscription = dataclasses.field(compare=False)

    def __call__(self, event: CircuitChanged) -> None:
        self.subscription.deliver(dataclasses.replace(event, function=self.function))


class Circuit:
    """The stage: one call through the breaker, or through the breaker of its fallback value.

    An error that the stages behind it refuse with counts neither way, and neither does a call that
    is cancelled. With the test switch on nothing is refused, and no failure is counted.

    Args:
        breaker: The breaker; with several fallback values the template of theirs.
        emitter: The function's name and listeners.
        several: Returns whether a call's value is one of several, so that it has a breaker of its
            own; None without fallback.
        label: Returns the label of a call's fallback value, for the name of its breaker.

    Attributes:
        breaker: As given.
        only: The breaker, if it is that of all calls; None if that depends on the call.
    """

    name = "circuit"

    def __init__(
        self,
        breaker: CircuitBreaker,
        emitter: Emitter,
        *,
        several: Callable[[Call], bool] | None = None,
        label: Callable[[Call], str | None] | None = None,
    ) -> None:
        self.breaker = breaker
        self._several = several
        self.only: CircuitBreaker | None = breaker if several is None else None
        self._label = label
        breaker.guard(emitter.function, emitter.module)
        for listener in emitter.listeners:
            # A shared breaker outlives its functions and must not keep what they listen with.
            adapter = _FunctionListener(
                function=emitter.function, listener=listener.handler, subscription=listener
            )
            cancel = breaker.subscribe(adapter)
            finalize(self, cancel).atexit = False

    def describe(self) -> str:
        """Return the line for `explain()`."""
        each = ", for each value by itself" if self._several is not None else ""
        return f"{self.breaker.describe()}{each}"

    # --- fallback values ------------------------------------------------------------------------

    def for_value(self, call: Call) -> CircuitBreaker:
        """Return the breaker of a call: that of its value if it is one of several."""
        if self._several is None or not self._several(call):
            return self.breaker
        index = call.value_index or 0
        key = part_key(call.value, index)
        found = self.breaker.known_part(key)
        if found is not None:
            return found
        label = self._label(call) if self._label is not None else None
        return self.breaker.part(key, label or f"value {index}")

    def refuses(self, value: object, index: int) -> float | None:
        """Return whether the breaker of one of several values would refuse a call now.

        Args:
            value: The value.
            index: Its place in the list.

        Returns:
            None if it lets the call through, else the seconds until it may; infinity if it is held
            open by hand.
        """
        if ambient.disabled():
            return None
        part = self.breaker.known_part(part_key(value, index))
        if part is not None:
            return part.refuses()
        return math.inf if self.breaker.state is CircuitState.FORCED_OPEN else None

    def refusal(self, waits: Iterable[float]) -> CircuitOpenError:
        """Return the error for a call all of whose values are refused.

        Args:
            waits: What `refuses` said for each of them.
        """
        soonest = min(waits)
        return CircuitOpenError(self.breaker.name, soonest if math.isfinite(soonest) else None)

    def outlasts(self, call: Call, pause: float) -> str | None:
        """Return why a call would still be refused after a pause; None if it might not.

        With several fallback values that is not known: each has a breaker of its own.
        """
        if ambient.disabled() or (self._several is not None and self._several(call)):
            return None
        breaker = self.breaker
        wait = breaker.refuses()
        # While a probe is under way it is not known how long it takes.
        if wait is None or wait <= pause or breaker.state is CircuitState.HALF_OPEN:
            return None
        more = f" for another {format_seconds(round(wait, 3))}" if math.isfinite(wait) else ""
        return f"circuit {breaker.name!r} is open{more}"

    def refused_value(self, call: Call, error: Exception) -> bool:
        """Return whether an error is the refusal of the call's own value, so that the next may be tried."""
        return (
            isinstance(error, CircuitOpenError)
            and self._several is not None
            and self._several(call)
            and error.name == self.for_value(call).name
        )

    # --- adapters -------------------------------------------------------------------------------

    def _acquire(self, breaker: CircuitBreaker, call: Call) -> Permit:
        """Return a permit where there is no current one for all calls."""
        # A call that was already made cannot be refused any more.
        return FREE if ambient.disabled() or call.prior_outcome is not None else breaker.acquire()

    def _failed(self, permit: Permit, error: Exception) -> None:
        if ambient.disabled():
            permit.release()
        else:
            permit.failure(error)

    def _stream_ended(self, permit: Permit, error: BaseException | None) -> None:
        """Count a plain generator at its end; one that is dropped counts neither way."""
        if isinstance(error, Exception):
            self._failed(permit, error)
        elif error is not None:
            permit.release()
        elif not permit.silent:
            permit.success(None)

    def wrap_sync(self, proceed: Proceed) -> Proceed:
        """Put the stage before `proceed`."""
        only = self.only

        def run(call: Call) -> Any:
            breaker = only or self.for_value(call)
            permit = breaker.current_permit or self._acquire(breaker, call)
            try:
                result = proceed(call)
            except Exception as error:
                self._failed(permit, error)
                raise
            except BaseException:
                permit.release()
                raise
            if call.stream is not None:
                call.stream.at_end(functools.partial(self._stream_ended, permit))
            elif not permit.silent:
                permit.success(result)
            return result

        return run

    def wrap_async(self, proceed: AsyncProceed) -> AsyncProceed:
        """Put the stage before `proceed`, for an event loop."""
        only = self.only

        async def run(call: Call) -> Any:
            breaker = only or self.for_value(call)
            permit = breaker.current_permit or self._acquire(breaker, call)
            try:
                result = await proceed(call)
            except Exception as error:
                self._failed(permit, error)
                raise
            except BaseException:
                permit.release()
                raise
            if not permit.silent:
                permit.success(result)
            return result

        return run


class CircuitCheck:
    """The stage before those that wait: refuses at once what `Circuit` would refuse later.

    Args:
        circuit: The stage that it speaks for.
    """

    name = "circuit check"

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit

    def describe(self) -> str:
        """Return nothing: `Circuit` has its line in `explain()`."""
        return ""

    def wrap_sync(self, proceed: Callable[[Call], T]) -> Callable[[Call], T]:
        """Put the stage before `proceed`."""
        circuit, only = self._circuit, self._circuit.only

        def run(call: Call) -> T:
            breaker = only or circuit.for_value(call)
            if (
                breaker.current_permit is None
                and call.prior_outcome is None
                and not ambient.disabled()
            ):
                breaker.check()
            return proceed(call)

        return run

    # Nothing follows the call, so that it need not be awaited here.
    wrap_async = wrap_sync
