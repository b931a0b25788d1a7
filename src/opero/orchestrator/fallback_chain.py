# this_file: src/opero/orchestrator/fallback_chain.py
"""Call one function after the other until one succeeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from opero import events
from opero.core.failures import attach
from opero.errors import DeadlineError, OperoUsageError
from opero.events.bus import Emitter
from opero.orchestrator.config import functions
from opero.utils.async_utils import ensure_async, is_async_function, run_async
from opero.utils.checks import function
from opero.utils.parameters import unwrap_partial
from opero.utils.steps import BlockingStep, StepLogic, run_sync
from opero.utils.steps import run_async as run_logic_async

if TYPE_CHECKING:
    from opero.events import Event


class FallbackChain:
    """A function and those to fall back on, in order, with the same arguments.

    Any `Exception` moves on to the next function, but for a wrong use of opero and the end of a deadline, which the
    next function cannot change. When all have failed the caller gets the last error itself, with the earlier ones
    chained behind it and named in a note.

    Args:
        primary: The function that is tried first.
        fallbacks: A function, several, or None.
        on_event: A listener for the chain's own events.

    Attributes:
        functions: All of them, in order.
        awaits: Whether any of them is asynchronous.

    Raises:
        OperoUsageError: Something is no function.

    Example:
        >>> chain = FallbackChain(int, lambda text: float(text))
        >>> chain.execute_sync("2"), chain.execute_sync("2.5"), chain.has_fallbacks()
        (2, 2.5, True)

    In asynchronous code `await chain(...)` is the same as `await chain.execute(...)`.
    """

    def __init__(
        self,
        primary: Callable[..., Any],
        fallbacks: Callable[..., Any] | Iterable[Callable[..., Any]] | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
    ) -> None:
        function("primary", primary)
        self.functions: tuple[Callable[..., Any], ...] = (
            primary,
            *functions("fallbacks", fallbacks),
        )
        self.awaits: bool = any(is_async_function(function) for function in self.functions)
        self._asynchronous = [ensure_async(function) for function in self.functions]
        self._emitter = Emitter(
            name_of(primary),
            () if on_event is None else (on_event,),
            module=getattr(primary, "__module__", None),
        )

    def has_fallbacks(self) -> bool:
        """Return whether there is more than one function."""
        return len(self.functions) > 1

    @property
    def primary(self) -> Callable[..., Any]:
        """The first function."""
        return self.functions[0]

    @property
    def fallbacks(self) -> list[Callable[..., Any]]:
        """The functions after the first."""
        return list(self.functions[1:])

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `execute` does."""
        return await self.execute(*args, **kwargs)

    async def execute(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the functions in order until one returns; synchronous ones run in a thread.

        Raises:
            Exception: The last function's own error.
        """
        return await run_logic_async(self._attempts(args, kwargs))

    def execute_sync(self, /, *args: Any, **kwargs: Any) -> Any:
        """Do what `execute` does, for callers without an event loop, or in the middle of one.

        Raises:
            Exception: The last function's own error.
        """
        if self.awaits:
            return run_async(self.execute(*args, **kwargs))
        return run_sync(self._attempts(args, kwargs))

    def _attempts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepLogic[Any]:
        errors: list[Exception] = []
        try:
            for block, wait in zip(self.functions, self._asynchronous, strict=True):
                try:
                    return (
                        yield BlockingStep(partial(block, **kwargs), partial(wait, **kwargs), args)
                    )
                except Exception as error:
                    if not self._goes_on(errors, error):
                        raise
        finally:
            # Errors hold tracebacks, those hold frames, and frames hold the list.
            errors.clear()

    def _goes_on(self, earlier: list[Exception], error: Exception) -> bool:
        """Record a failure and return whether another function is called; if not, put the earlier ones behind it."""
        failed = [*earlier, error]
        if len(failed) < len(self.functions) and not isinstance(
            error, DeadlineError | OperoUsageError
        ):
            earlier.append(error)
            if self._emitter.active:
                self._emitter.emit(
                    events.FallbackUsed(
                        function=self._emitter.function,
                        value=name_of(self.functions[len(failed)]),
                        index=len(failed),
                    )
                )
            return True
        if earlier:
            name = name_of(self.primary)
            lines = [f"and its fallbacks failed, {len(failed)} functions"]
            for function, one in zip(self.functions, failed, strict=False):
                lines.append(f"  {name_of(function)}: {type(one).__name__}")
            owner = f"{getattr(self.primary, '__module__', '')}.{name} and fallbacks"
            attach(error, name, "\n".join(lines), earlier, owner=owner)
        return False

    def __repr__(self) -> str:
        return f"<FallbackChain {' → '.join(name_of(function) for function in self.functions)}>"


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, looking through `functools.partial`."""
    inner = unwrap_partial(function)
    return getattr(inner, "__name__", type(inner).__name__)
