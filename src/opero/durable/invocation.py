# this_file: src/opero/durable/invocation.py
"""From a call to the record of a new run, and back to the run that its id stands for."""

from __future__ import annotations

import uuid
from typing import Any, Final

from opero.durable.arguments import digest_of
from opero.durable.failures import pack_error
from opero.durable.records import StepRecord, StepState, WorkflowRecord
from opero.durable.registry import WorkflowSpec, workflows
from opero.durable.values import encode
from opero.errors import IdConflictError, OperoUsageError, UnknownWorkflowError

__all__ = ["MISSING", "draw_id", "new_run", "place_of", "resolution", "same_run", "version_now"]

MISSING: Final = object()
"""Stands for a result that was not given; None may be one."""


def new_run(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], workflow_id: str | None
) -> tuple[WorkflowSpec, WorkflowRecord]:
    """Return what is to be run, and its record.

    Raises:
        UnknownWorkflowError: No such workflow is registered.
        TypeError: The arguments do not fit.
        UnserializableError: The journal cannot keep one of them.
    """
    spec = workflows.latest(name)
    what = f"workflow {name}()"
    digest = digest_of(spec.parameters, args, kwargs, what)
    record = WorkflowRecord(
        id=workflow_id or draw_id(),
        name=name,
        version=spec.version,
        args=encode((args, kwargs), f"arguments of {what}"),
        hash=digest,
    )
    return spec, record


def same_run(record: WorkflowRecord, found: WorkflowRecord) -> str:
    """Return the id of a run if what is found under it is the same run.

    Raises:
        IdConflictError: It is another one.
    """
    if (found.name, found.hash) != (record.name, record.hash):
        raise IdConflictError(
            f"workflow id {record.id!r} belongs to a run of {found.name!r}"
            f"{'' if found.name != record.name else ' with other arguments'}."
        )
    return record.id


def draw_id() -> str:
    """Return an id that nobody has."""
    return str(uuid.uuid4())


def place_of(steps: list[StepRecord], wanted: int | str, workflow_id: str) -> int:
    """Return the place of the step that a user names by number or path; one behind the last is allowed.

    Raises:
        OperoUsageError: There is no such step.
    """
    for number, step in enumerate(steps, start=1):
        if wanted in (number, step.path):
            return step.order
    if wanted == len(steps) + 1:
        return max((step.order for step in steps), default=0) + 1
    raise OperoUsageError(
        f"from_step={wanted!r}: workflow {workflow_id!r} has steps 1 to {len(steps)}; "
        "give a number, or a path as steps() shows it."
    )


def version_now(record: WorkflowRecord) -> str | None:
    """Return the version of the code of today, which runs a copy."""
    try:
        return workflows.latest(record.name).version
    except UnknownWorkflowError:
        return record.version


def resolution(path: str, result: Any, error: Exception | None, again: bool) -> StepRecord | None:
    """Return what a step in doubt shall be, None to run it again.

    Raises:
        OperoUsageError: Not exactly one of the three is given.
    """
    if (result is not MISSING) + (error is not None) + bool(again) != 1:
        raise OperoUsageError("resolve(): give one of result=, error= and again=True.")
    if again:
        return None
    if error is not None:
        state, text = StepState.FAILED, pack_error(error)
    else:
        state, text = StepState.DONE, encode(result, "result")
    return StepRecord(path=path, name="", hash="", state=state, value=text)
