# this_file: src/opero/tasks/sequence.py
"""One step after the other, each with what the one before has given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from opero.errors import OperoUsageError
from opero.tasks.runnable import Runnable, as_runnable
from opero.tasks.task_run import NOTHING, TaskRun, carry_out

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Returns", "Sequence", "joined"]

Returns = Literal["all", "last"]


class Sequence(Runnable):
    """Steps that run one after the other; the first that fails ends it with its own error.

    A step gets the last result as its first argument if it has no positional arguments of its own and its function
    needs one; that is decided here, when the sequence is made. After a nested sequence it gets that one's
    last result, after a `Parallel` the list.

    Args:
        steps: Tasks, sequences, parallels, circuit groups, or functions.
        returns: "all" for the list of results in order, "last" for the last one.
        name: Shown in events and errors; the names of the steps by default.

    Raises:
        OperoUsageError: Something is no step.

    Example:
        >>> from opero.tasks import Sequence, Task, run_sync
        >>> shout = Sequence(Task(str.strip, " tea "), str.upper, name="shout")
        >>> run_sync(shout)
        ['tea', 'TEA']
        >>> run_sync(Sequence(shout, len, returns="last"))
        3
    """

    def __init__(
        self,
        *steps: Runnable | Callable[..., Any],
        returns: Returns = "all",
        name: str | None = None,
    ) -> None:
        if returns not in ("all", "last"):
            raise OperoUsageError(f'returns={returns!r} must be "all" or "last".')
        made = tuple(as_runnable(step) for step in steps)
        super().__init__(name, _names(made) or type(self).__name__)
        self.steps: tuple[Runnable, ...] = made
        self.returns: Returns = returns
        self.takes_input: bool = made[0].takes_input if made else True
        self._piped = False

    async def execute(self, run: TaskRun) -> Any:
        """Do the work of a run."""
        try:
            results: list[Any] = []
            passed = run.given
            for step in self.steps:
                result, passed = await _one(step, passed if step.takes_input else NOTHING)
                results.append(result)
            run.passes = passed
            if self.returns == "all":
                return results
            return results[-1] if results else None
        finally:
            # The run will hold the error that passes through this frame.
            del run


async def _one(step: Runnable, given: Any) -> tuple[Any, Any]:
    """Run one step: its result, and what the next one gets."""
    run = TaskRun(step, given)
    try:
        return await carry_out(run), run.passes
    finally:
        del run  # as above


def joined(first: Runnable, then: Runnable) -> Sequence:
    """Make the sequence of two; those that `|` made before become parts of one."""
    made = Sequence(*_parts(first), *_parts(then))
    made._piped = True  # noqa: SLF001 - a matter of this module
    return made


def _parts(runnable: Runnable) -> Iterable[Runnable]:
    piped = isinstance(runnable, Sequence) and runnable._piped  # noqa: SLF001 - as above
    return runnable.steps if isinstance(runnable, Sequence) and piped else (runnable,)


def _names(steps: tuple[Runnable, ...]) -> str:
    names = [step.name for step in steps]
    if len(names) > 3:
        names[1:-1] = ["…"]
    return " | ".join(names)
