# this_file: src/opero/core/wrapper.py
"""Generate the function that replaces the user's."""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import time
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from opero.caching.keying import short_part
from opero.caching.keys import FAST_TYPES
from opero.core.call import Call
from opero.core.deadline import leave
from opero.core.function import stars, unwrap_partial
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline

__all__ = [
    "express_body",
    "express_names",
    "has_express_lane",
    "is_unguarded",
    "make_call",
    "make_wrapper",
]

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


_LANE = """\
{define} _wrapper({parameters}):
    if _opero_switch.on or _opero_lane.closed:
        return {wait}_opero_run(_opero_Call({args}, {kwargs}))
"""

# The types of all arguments are looked at before they are compared: 1, True and 1.0 are different
# calls.
_HIT = """\
    if {all_fast}:
        _opero_key = ({key},)
        _opero_entry = _opero_get(_opero_key)
        if _opero_entry is not None and _opero_entry.expires > _opero_now():
            _opero_count_hit()
            _opero_entry.visited = True
            if _opero_entry.thaw is None:
                return _opero_entry.value
            return _opero_entry.thaw(_opero_entry.value)
        _opero_call = _opero_Call({args}, {kwargs})
        _opero_call.key = _opero_key
        return {wait}_opero_run(_opero_call)
    return {wait}_opero_run(_opero_Call({args}, {kwargs}))
"""

_STAGES_ONLY = """\
    return {wait}_opero_run(_opero_Call({args}, {kwargs}))
"""

# It has the function's own parameters, so that a missing argument is a TypeError at once and no
# failure to be retried.
_RECEIPT = """\
def _wrapper({parameters}):
    return _opero_receipt(_opero_Call({args}, {kwargs}))
"""

_GENERATOR = """\
def _wrapper({parameters}):
    return (yield from _opero_run(_opero_Call({args}, {kwargs})).stream())
"""

_ASYNC_GENERATOR = """\
async def _wrapper({parameters}):
    _opero_started = await _opero_run(_opero_Call({args}, {kwargs}))
    while not _opero_started.ended:
        try:
            _opero_sent = yield _opero_started.item
        except _opero_GeneratorExit:
            await _opero_started.source.aclose()
            raise
        except _opero_BaseException as _opero_thrown:
            await _opero_started.advance(_opero_started.source.athrow, _opero_thrown)
        else:
            await _opero_started.advance(_opero_started.source.asend, _opero_sent)
"""


def make_wrapper(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function that users call.

    It is a plain function with the original's parameters, defaults, name and docs; a coroutine
    function, generator function or asynchronous generator function exactly if the original is one.
    """
    info = pipeline.info
    parameters = list(info.calling.parameters.values())
    namespace: dict[str, Any] = {
        "_opero_switch": switch,
        "_opero_lane": pipeline.lane,
        "_opero_run": pipeline.run,
        "_opero_Call": Call,
        "_opero_count": pipeline.stats.call_tally.count,
        # A parameter may have the name of a builtin.
        "_opero_Exception": Exception,
        "_opero_BaseException": BaseException,
        "_opero_GeneratorExit": GeneratorExit,
    }
    if pipeline.cache is not None:
        namespace |= {
            "_opero_get": pipeline.cache.express_get,
            "_opero_now": time.monotonic,
            "_opero_count_hit": pipeline.stats.hit_tally.count,
            "_opero_type": type,
            "_opero_id": id,
            "_opero_token": pipeline.cache.token_get,
        }
        namespace |= {f"_opero_{kind.__name__}": kind for kind in FAST_TYPES}
        for n, part in _default_parts(parameters).items():
            namespace[f"_opero_part_{n}"] = part
            namespace[f"_opero_copy_{n}"] = list(part[1])
    if has_express_lane(pipeline):
        namespace |= express_names(pipeline)
    wrapper = _made(_source(pipeline, parameters), parameters, namespace)
    wrapper.__code__ = wrapper.__code__.replace(co_name=info.name, co_qualname=info.qualname)
    wrapper.__name__, wrapper.__qualname__, wrapper.__module__ = (
        info.name,
        info.qualname,
        info.module,
    )
    if inspect.isroutine(info.fn):
        return functools.update_wrapper(wrapper, info.fn)
    # What a class, an object or a partial carries is its own and not the function's.
    wrapper.__doc__ = unwrap_partial(info.fn).__doc__
    return functools.update_wrapper(wrapper, info.fn, assigned=(), updated=())


def make_call(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function's `.call(...)`, which takes its arguments and gives a receipt."""
    info = pipeline.info
    parameters = list(info.calling.parameters.values())
    source = _RECEIPT.format(
        parameters=_declaration(parameters), args=_packed(parameters), kwargs=_keywords(parameters)
    )
    call = _made(source, parameters, {"_opero_receipt": pipeline.receipt, "_opero_Call": Call})
    call.__name__, call.__qualname__, call.__module__ = "call", f"{info.qualname}.call", info.module
    call.__doc__ = f"Call `{info.name}` and return a `Receipt`: the value and how it came about."
    return call


def _made(
    source: str, parameters: list[inspect.Parameter], namespace: dict[str, Any]
) -> FunctionType:
    """Make a function of its source, its parameters' defaults and the names that it uses."""
    defaults = {
        f"_opero_default_{n}": p.default
        for n, p in enumerate(parameters)
        if p.default is not p.empty
    }
    scope: dict[str, Any] = {}
    exec(_compiled(source), namespace | defaults, scope)  # noqa: S102 - our template, names only
    made: FunctionType = scope["_wrapper"]
    return made


def _source(pipeline: Pipeline, parameters: list[inspect.Parameter]) -> str:
    info = pipeline.info
    asynchronous = info.kind in ("async", "async_generator")
    blanks = {
        "define": "async def" if asynchronous else "def",
        "wait": "await " if asynchronous else "",
        "line": "queues" if asynchronous else "tickets",
        "parameters": _declaration(parameters),
        "args": _packed(parameters),
        "kwargs": _keywords(parameters),
        "forward": _forwarded(parameters),
    }
    if info.kind == "generator":
        return _GENERATOR.format(**blanks)
    if info.kind == "async_generator":
        return _ASYNC_GENERATOR.format(**blanks)
    body = express_body(pipeline) if has_express_lane(pipeline) else _STAGES_ONLY
    keyed = pipeline.cache.express_parameters if pipeline.cache is not None else None
    if keyed:
        body = _HIT
        of_instance = pipeline.cache is not None and pipeline.cache.of_instance
        blanks |= _key(keyed, parameters, of_instance=of_instance)
    return (_LANE + body).format(**blanks)


def _declaration(parameters: list[inspect.Parameter]) -> str:
    """Write the parameters of a `def`, without annotations, with defaults by reference."""
    parts: list[str] = []
    kinds = [p.kind for p in parameters]
    for n, p in enumerate(parameters):
        if (
            p.kind is p.KEYWORD_ONLY
            and p.VAR_POSITIONAL not in kinds
            and kinds.index(p.KEYWORD_ONLY) == n
        ):
            parts.append("*")
        parts.append(stars(p) + p.name + ("" if p.default is p.empty else f"=_opero_default_{n}"))
        if p.kind is p.POSITIONAL_ONLY and kinds[n + 1 : n + 2] != [p.POSITIONAL_ONLY]:
            parts.append("/")
    return ", ".join(parts)


def _packed(parameters: list[inspect.Parameter]) -> str:
    """Write the tuple of positional arguments."""
    names = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    names += [f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL]
    return f"({', '.join(names)}{',' * (len(names) == 1)})"


def _keywords(parameters: list[inspect.Parameter]) -> str:
    """Write the dict of keyword arguments."""
    items = [f"{p.name!r}: {p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY]
    items += [f"**{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD]
    return "{" + ", ".join(items) + "}"


def _forwarded(parameters: list[inspect.Parameter]) -> str:
    """Write the arguments of the call of the original function."""
    names = _packed(parameters)[1:-1].rstrip(",")
    items = [f"{p.name}={p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY]
    items += [f"**{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD]
    return ", ".join([*([names] if names else []), *items])


_BY_FREQUENCY = (str, int, *sorted(FAST_TYPES - {str, int}, key=lambda kind: kind.__name__))


def _default_parts(parameters: list[inspect.Parameter]) -> dict[int, Any]:
    """Return the key parts of defaults that are short lists or tuples, such as the values of a fallback, by place."""
    found = {}
    for n, p in enumerate(parameters):
        part = short_part(type(p.default), p.default) if type(p.default) in (list, tuple) else None
        if part is not None:
            found[n] = part
    return found


def _key(
    names: tuple[str, ...], parameters: list[inspect.Parameter], *, of_instance: bool
) -> dict[str, str]:
    """Write the key of a hit and the test that it may be used; its shape is `core.cache.keying`'s."""
    tests, parts = [], []
    places = {p.name: n for n, p in enumerate(parameters)}
    of_defaults = _default_parts(parameters)
    for name in names:
        n = places[name]
        # Compared one by one: a metaclass may make its classes unhashable, and `in` a set fail.
        kinds = [f"_opero_type_{n} is _opero_{kind.__name__}" for kind in _BY_FREQUENCY]
        kinds[0] = f"(_opero_type_{n} := _opero_type({name})) is _opero_{_BY_FREQUENCY[0].__name__}"
        part = name
        if n in of_defaults:
            # The default itself needs no look at its items; a list might have been changed meanwhile.
            same = f"{name} is _opero_default_{n}"
            if type(parameters[n].default) is list:
                same += f" and {name} == _opero_copy_{n}"
            kinds.append(f"({same})")
            part = f"_opero_part_{n} if {name} is _opero_default_{n} else {name}"
        tests.append(f"({' or '.join(kinds)})")
        parts.append(f"_opero_type_{n}, {part}")
    if of_instance:
        tests[0] = f"(_opero_instance := _opero_token(_opero_id({names[0]}))) is not None"
        parts[0] = "_opero_instance"
    return {"all_fast": " and ".join(tests), "key": ", ".join(parts)}


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> CodeType:
    """Compile a template once and leave its text where tracebacks and debuggers look for it."""
    name = f"<opero wrapper {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec")


_numbers = itertools.count(1)
