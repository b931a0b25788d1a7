# this_file: src/opero/durable/replay.py
"""What a step finds in the journal, and what follows from it: pure decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from opero.durable.records import StepRecord, StepState
from opero.errors import NonDeterminismError

__all__ = ["Course", "Verdict", "judge"]


class Course(Enum):
    """What to do about a step."""

    RUN = "run"
    RETURN = "return"
    RAISE = "raise"
    DOUBT = "doubt"


@dataclass(slots=True)
class Verdict:
    """What to do, and with what; not frozen, because a replay makes thousands of them.

    Attributes:
        course: What.
        text: The recorded result or error.
        attempts: Number of the attempt to begin with.
        wake: Wall-clock seconds before which it must not begin, None for at once.
    """

    course: Course
    text: str | None = None
    attempts: int = 1
    wake: float | None = None


_FIRST = Verdict(Course.RUN)


def judge(
    workflow: str,
    path: str,
    found: StepRecord | None,
    name: str,
    digest: str,
    *,
    idempotent: bool = True,
) -> Verdict:
    """Compare a call with what the journal has at its place.

    Args:
        workflow: Id of the run, for the error.
        path: Place of the step.
        found: What the journal has there.
        name: What the program calls.
        digest: Digest of the arguments it calls it with.
        idempotent: Whether a call that may have happened may happen again.

    Raises:
        NonDeterminismError: It has something else there.
    """
    if found is None:
        return _FIRST
    if found.name != name or found.hash != digest:
        raise NonDeterminismError(
            workflow, path, _shown(found.name, found.hash), _shown(name, digest)
        )
    match found.state:
        case StepState.DONE:
            return Verdict(Course.RETURN, found.value)
        case StepState.FAILED:
            return Verdict(Course.RAISE, found.value)
        case StepState.STARTED if not idempotent:
            return Verdict(Course.DOUBT)
        case _:
            return Verdict(Course.RUN, attempts=found.attempts, wake=found.wake)


def _shown(name: str, digest: str) -> str:
    return f"{name}({digest[:6]})" if digest else name
