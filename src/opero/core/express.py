# this_file: src/opero/core/express.py
"""The express lane past the guards: source text for wrappers whose first call may be made at once.

A circuit that is closed, a permit and a slot that are free and a deadline that begins now take no
waiting, so no stage is asked. Whatever else comes up, the call goes through the stages: from the
start, or as a call that is made already and has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.core.deadline import leave

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline

__all__ = ["express_body", "express_names", "has_express_lane", "is_unguarded"]

_STAGES = "return {wait}_opero_run(_opero_Call({args}, {kwargs}))"

# No name keeps the error: a frame that does, and that the error has passed through, is a reference
# cycle.
_FAILED = """\
except _opero_Exception as _opero_error:
    _opero_call = _opero_Call({args}, {kwargs})
    _opero_call.calls = 1
    _opero_call.begun = _opero_error
"""

_MADE = """\
_opero_count()
try:
    return {wait}_opero_fn({forward})
"""

# A failure is told to the circuit by its stage; what is interrupted does not count in a closed one.
_MADE_THROUGH_CIRCUIT = """\
_opero_count()
try:
    _opero_result = {wait}_opero_fn({forward})
"""

_TOLD_TO_CIRCUIT = """\
else:
    if not _opero_permit.silent:
        _opero_permit.success(_opero_result)
    return _opero_result
"""

_CIRCUIT = f"""\
_opero_permit = _opero_breaker.standing
if _opero_permit is None:
    {_STAGES}
"""

# Whoever has to wait, or comes when others do, waits in the stage, and without the permit till then.
_SLOT = """\
if _opero_limiter.{line} or _opero_limiter.take_slot():
    _opero_call = _opero_Call({args}, {kwargs})
else:
"""

# The stage looks for `_opero_held` in the frames of calls around one that would wait for ever.
_PERMIT = f"""\
if not _opero_limit.try_acquire():
    {_STAGES}
_opero_held = True
try:
"""

_PERMIT_BACK = """\
finally:
    _opero_held = False
    _opero_limit.release()
"""

_DEADLINE = """\
_opero_scope = _opero_begin()
try:
"""

# What the call has used of its budget is used; a call that its deadline has cut short has not failed.
_DEADLINE_KEPT = """\
    _opero_call.started = _opero_scope.end - _opero_budget
    _opero_call.overdue = _opero_scope.overdue
"""

_DEADLINE_LEFT = """\
finally:
    _opero_leave(_opero_scope)
"""

_GO_ON = "return {wait}_opero_run(_opero_call)\n"


def has_express_lane(pipeline: Pipeline) -> bool:
    """Tell whether a wrapper may make the first call before any stage is asked.

    It may if only retry and guards stand around the function. A synchronous call with a timeout is
    made in a thread, and the stages know what to do with it.
    """
    options, limit = pipeline.options, pipeline.rate_limit
    return (
        pipeline.cache is None
        and pipeline.fallback is None
        and options.retry_budget is None
        and options.retry_if_result is None
        and not pipeline.report.needs_start
        and (limit is None or limit.limiter.direct)
        and pipeline.info.kind in ("sync", "async")
        and (pipeline.timeout is None or pipeline.awaits)
    )


def is_unguarded(pipeline: Pipeline) -> bool:
    """Tell whether the express lane is nothing but the first call itself."""
    guards = (
        pipeline.deadline,
        pipeline.concurrency,
        pipeline.rate_limit,
        pipeline.circuit,
        pipeline.timeout,
    )
    return has_express_lane(pipeline) and all(guard is None for guard in guards)


def express_body(pipeline: Pipeline) -> str:
    """Write what follows the test that the lane is open, as the body of a function."""
    through_circuit = pipeline.circuit is not None
    body = (_MADE_THROUGH_CIRCUIT if through_circuit else _MADE) + _FAILED
    if pipeline.deadline is not None:
        body += _DEADLINE_KEPT
    if through_circuit:
        body += _TOLD_TO_CIRCUIT
    if pipeline.rate_limit is not None:
        body = _SLOT + _indented(body)
    if pipeline.concurrency is not None:
        body = _PERMIT + _indented(body) + _PERMIT_BACK
    if through_circuit:
        body = _CIRCUIT + body
    if pipeline.deadline is not None:
        body = _DEADLINE + _indented(body) + _DEADLINE_LEFT
    return _indented(body + _GO_ON)


def express_names(pipeline: Pipeline) -> dict[str, Any]:
    """Return what the text above refers to."""
    names: dict[str, Any] = {"_opero_fn": _limited(pipeline)}
    if pipeline.rate_limit is not None:
        names["_opero_limiter"] = pipeline.rate_limit.limiter
    if pipeline.concurrency is not None:
        names["_opero_limit"] = pipeline.concurrency.limit
    if pipeline.circuit is not None:
        names["_opero_breaker"] = pipeline.circuit.breaker
    if pipeline.deadline is not None:
        names["_opero_begin"], names["_opero_leave"] = pipeline.deadline.begin, leave
        names["_opero_budget"] = pipeline.deadline.seconds
    return names


def _limited(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function, with its limits of time around it where it can be cancelled."""
    timeout, deadline, fn = pipeline.timeout, pipeline.deadline, pipeline.info.fn
    if not pipeline.awaits or (timeout is None and deadline is None):
        return fn
    from opero.core.timeout import Timeout

    timeout = timeout or Timeout(None, pipeline.emitter)
    return timeout.express(fn, None if deadline is None else deadline.seconds)


def _indented(text: str) -> str:
    return "".join(f"    {line}" for line in text.splitlines(keepends=True))
