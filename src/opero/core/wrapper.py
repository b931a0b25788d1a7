# this_file: src/opero/core/wrapper.py
"""Generate the function that replaces the user's: same parameters, a fast path in front of the stages.

A wrapper that names its parameters needs no `*args, **kwargs`, so that a cache hit costs a third of
what a closure needs; `dataclasses` and attrs generate functions for the same reason. The source of
one shape of parameters is compiled once, shared by all functions of that shape, and readable in
tracebacks. Names in it begin with `_opero_`, because a parameter may have the name of a builtin.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.keys import FAST_TYPES
from opero.caching.keys.function_keys import default_parts, key_source
from opero.caching.memory import Entry, MemoryStore
from opero.core.call import Call
from opero.core.deadline import leave
from opero.core.function import unwrap_partial
from opero.core.stream import AsyncStream
from opero.utils.ambient import switch
from opero.utils.parameters import NoDefault, Parameter, write_parameters

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline


# --- templates: the function, and what stands in place of {body} ----------------------------------

_FUNCTION: Final = """\
{define} _wrapper({parameters}):
    if _opero_switch.on or _opero_fast_path.closed:
        {stages}
    {body}
"""

_CALL: Final = "_opero_call = _opero_Call({args}, {kwargs})\n"
_RUN: Final = "return {wait}_opero_run(_opero_call)\n"
_STAGES: Final = "return {wait}_opero_run(_opero_Call({args}, {kwargs}))\n"

# The types of all arguments are compared before their values: 1, True and 1.0 are different calls.
_FAST_KEY: Final = """\
if {all_fast}:
    _opero_key = ({key},)
else:
    {slow_key}
"""

_SLOW_KEY: Final = "_opero_key = _opero_cache.key({args}, {kwargs})\n"

_LOOK_UP: Final = """\
{find_key}
{hit}
{miss}
_opero_call.key = _opero_key
return {wait}_opero_run(_opero_call)
"""

_HIT: Final = """\
_opero_entry = _opero_get(_opero_key)
if _opero_entry is not None and _opero_entry.expires > _opero_now():
    _opero_count_hit()
    _opero_entry.visited = True
    if _opero_entry.copier is None:
        return _opero_entry.value
    return _opero_entry.copier(_opero_entry.value)
"""

# What a caller leads it lands, hands over to the stages, or gives up, however its first call ends.
_LEAD: Final = """\
_opero_flight = _opero_cache.find_or_lead(_opero_key)
if _opero_isinstance(_opero_flight, _opero_Entry):
    _opero_count_hit()
    return _opero_flight.open()
if _opero_flight is None:
    {new_call}
else:
    try:
        {body}
    except _opero_BaseException:
        _opero_cache.give_up(_opero_flight)
        raise
    _opero_call.flight = _opero_flight
"""

# No name keeps the error: a frame that does, and that the error has passed through, is a reference
# cycle. A call that its deadline has cut short has not failed, and what it used of its time is used.
_FIRST_CALL: Final = """\
_opero_count()
try:
    {real_call}
except _opero_Exception as _opero_error:
    {call}
    _opero_call.calls = 1
    _opero_call.prior_outcome = _opero_error
    {late}
else:
    {succeeded}
    {land}
    return _opero_result
"""

# A thread that the call leaves behind when its time is over is noted in it.
_REAL_CALL: Final = "_opero_result = {wait}_opero_fn({forward})"
_IN_THREAD: Final = (
    "_opero_result = _opero_limit_time(_opero_partial(_opero_fn, {forward}), _opero_call)"
)

_LAND: Final = """\
_opero_land(_opero_flight, _opero_result, _opero_store(_opero_flight, _opero_result, _opero_ttl))
"""

_LATE: Final = """\
_opero_call.started = _opero_scope.end - _opero_budget
_opero_call.overdue = _opero_scope.overdue
"""

# The circuit's stage counts failures; a call that is interrupted does not count in a closed circuit.
_SUCCEEDED: Final = """\
if not _opero_permit.silent:
    _opero_permit.success(_opero_result)
"""

# What sends a first call to the stages, innermost guard first. A call that has to wait, or that comes
# while others do, waits there, without the permit until then.
_REFUSED: Final = {
    "rate_limit": "_opero_limiter.{line} or _opero_limiter.take_slot()",
    "concurrency": "(_opero_held := _opero_limit.enter({task})) is None",
    "circuit": "(_opero_permit := _opero_breaker.current_permit) is None",
    "fallback": "(_opero_value := _opero_first({parameter})) is _opero_NoDefault",
}

_GUARDED: Final = """\
if {refused}:
    {call}
else:
    {body}
"""

_LEAVE: Final = "_opero_limit.leave(_opero_held)"
_HELD: Final = "_opero_bulkhead.leave(_opero_held, _opero_call)"

_WITHIN: Final = """\
{enter}
try:
    {body}
finally:
    {leave}
"""

# It has the function's own parameters, so that a missing argument is a TypeError at once and no
# failure to be retried.
_RECEIPT: Final = """\
def _wrapper({parameters}):
    return _opero_receipt(_opero_Call({args}, {kwargs}))
"""

_GENERATOR: Final = """\
def _wrapper({parameters}):
    return (yield from _opero_run(_opero_Call({args}, {kwargs})).iterate())
"""

# An asynchronous generator cannot delegate to another: this is the loop of `AsyncStream.iterate`.
_ASYNC_GENERATOR: Final = """\
async def _wrapper({parameters}):
    _opero_stream = _opero_AsyncStream(_opero_run(_opero_Call({args}, {kwargs})))
    await _opero_stream.send()
    while not _opero_stream.ended:
        try:
            _opero_sent = yield _opero_stream.item
        except _opero_GeneratorExit:
            await _opero_stream.close()
            raise
        except _opero_BaseException as _opero_thrown:
            await _opero_stream.throw(_opero_thrown)
        else:
            await _opero_stream.send(_opero_sent)
"""

_KINDS: Final = (AsyncStream, BaseException, Call, Entry, Exception, GeneratorExit, NoDefault, type)

_SHARED: Final[dict[str, Any]] = {
    f"_opero_{kind.__name__}": kind for kind in (*_KINDS, *FAST_TYPES)
} | {
    "_opero_id": id,
    "_opero_isinstance": isinstance,
    "_opero_partial": functools.partial,
}
"""What the source of every function may refer to."""


# --- functions ------------------------------------------------------------------------------------


def make_wrapper(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function that users call.

    It is a plain function with the original's parameters, defaults, name and docs; a coroutine
    function, generator function or asynchronous generator function exactly if the original is one.
    """
    info = pipeline.info
    wrapper = _made(_source(pipeline), info.calling, _names(pipeline))
    wrapper.__code__ = wrapper.__code__.replace(co_name=info.name, co_qualname=info.qualname)
    wrapper.__name__, wrapper.__qualname__ = info.name, info.qualname
    wrapper.__module__ = info.module
    if not isinstance(info.fn, FunctionType):
        import inspect

        if not inspect.isroutine(info.fn):
            # What a class, an object or a partial carries is its own and not the function's.
            wrapper.__doc__ = unwrap_partial(info.fn).__doc__
            return functools.update_wrapper(wrapper, info.fn, assigned=(), updated=())
    return functools.update_wrapper(wrapper, info.fn)


def make_call(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function's `.call(...)`, which takes its arguments and gives a receipt."""
    info = pipeline.info
    source = _fill(_RECEIPT, write_parameters(info.calling))
    call = _made(source, info.calling, {"_opero_receipt": pipeline.receipt})
    call.__name__, call.__qualname__, call.__module__ = "call", f"{info.qualname}.call", info.module
    call.__doc__ = f"Call `{info.name}` and return a `Receipt`: the value and how it came about."
    return call


def _made(source: str, parameters: Sequence[Parameter], names: dict[str, Any]) -> FunctionType:
    """Make a function of its source, its parameters' defaults and the names that it uses."""
    defaults = {f"_opero_default_{n}": p.default for n, p in enumerate(parameters)}
    scope: dict[str, Any] = {}
    code = _compiled(source)
    names |= defaults | {"__name__": code.co_filename, "__loader__": _Source(source)}
    exec(code, _SHARED | names, scope)  # noqa: S102 - our template, names only
    made: FunctionType = scope["_wrapper"]
    return made


def _names(pipeline: Pipeline) -> dict[str, Any]:
    """Return the objects of this function that the source refers to."""
    bulkhead, deadline, cache = pipeline.concurrency, pipeline.deadline, pipeline.cache
    names: dict[str, Any] = {
        "switch": switch,
        "fast_path": pipeline.fast_path,
        "run": pipeline.run,
        "count": pipeline.stats.call_counter.count,
        "fn": pipeline.limited_function(),
        "limit_time": pipeline.timeout and pipeline.timeout.run,
        "limiter": pipeline.rate_limit and pipeline.rate_limit.limiter,
        "breaker": pipeline.circuit and pipeline.circuit.breaker,
        "first": pipeline.fallback and pipeline.fallback.first,
        "leave": leave,
        "cache": cache,
    }
    if bulkhead is not None:
        names |= {"bulkhead": bulkhead, "limit": bulkhead.limit}
        if pipeline.awaits:
            # Imported here: a synchronous program never pays for asyncio.
            from asyncio import current_task

            names["current_task"] = current_task
    if deadline is not None:
        names |= {"begin": deadline.begin, "budget": deadline.seconds}
    if cache is not None:
        names |= {"land": cache.land, "store": cache.entries.store, "ttl": cache.ttl}
        names |= {"now": time.monotonic, "count_hit": pipeline.stats.hit_counter.count}
        if isinstance(cache.store, MemoryStore):
            names["get"] = cache.store.entries.get
        if cache.keys.instances is not None:
            names["token"] = cache.keys.instances.tokens.get
        for n, part in default_parts(pipeline.info.calling).items():
            names |= {f"part_{n}": part, f"copy_{n}": list(part[1])}
    return {f"_opero_{name}": value for name, value in names.items()}


# --- source text ----------------------------------------------------------------------------------


def _source(pipeline: Pipeline) -> str:
    """Write the function of a pipeline."""
    kind, parameters, cache = pipeline.info.kind, pipeline.info.calling, pipeline.cache
    awaits = kind == "async"
    in_thread = pipeline.timeout is not None and not awaits
    name = pipeline.fallback.parameter.name if pipeline.fallback else ""
    parts = write_parameters(parameters, {name: "_opero_value"}) | {
        "define": "async def" if awaits else "def",
        "wait": "await " if awaits else "",
        "task": "_opero_current_task" if awaits else "",
        "line": "loops_waiting" if awaits else "threads_waiting",
        "late": "" if pipeline.deadline is None else _LATE,
        "succeeded": "" if pipeline.circuit is None else _SUCCEEDED,
        "land": "" if cache is None else _LAND,
        "real_call": _IN_THREAD if in_thread else _REAL_CALL,
        "parameter": name,
        "new_call": _CALL,
        "call": "pass" if in_thread else _CALL,
        "stages": _STAGES,
    }
    if kind == "generator":
        return _fill(_GENERATOR, parts)
    if kind == "async_generator":
        return _fill(_ASYNC_GENERATOR, parts)
    body = _first_call(pipeline, in_thread=in_thread) if pipeline.has_fast_path else _STAGES
    if cache is not None and (cache.in_memory or pipeline.has_fast_path):
        names = cache.keys.fast_parameters if cache.in_memory else ()
        parts |= key_source(names, parameters, of_instance=cache.keys.of_instance) if names else {}
        parts |= {"find_key": _FAST_KEY if names else _SLOW_KEY, "slow_key": _SLOW_KEY}
        parts["hit"] = _HIT if cache.in_memory else ""
        body = _fill(_LOOK_UP, {"miss": body if pipeline.has_fast_path else _CALL})
    return _fill(_FUNCTION, parts | {"body": body})


def _first_call(pipeline: Pipeline, *, in_thread: bool) -> str:
    """Write the first call of a function with its guards around it, and what makes it known where there is a cache."""
    body = _FIRST_CALL
    for option, refused in _REFUSED.items():
        if getattr(pipeline, option) is not None:
            if option == "concurrency":
                body = _fill(
                    _WITHIN, {"enter": "", "body": body, "leave": _HELD if in_thread else _LEAVE}
                )
            body = _fill(_GUARDED, {"refused": refused, "body": body})
    if pipeline.deadline is not None:
        scope = {"enter": "_opero_scope = _opero_begin()", "leave": "_opero_leave(_opero_scope)"}
        body = _fill(_WITHIN, {**scope, "body": body})
    if in_thread:
        body = _CALL + body
    return body + _RUN if pipeline.cache is None else _fill(_LEAD, {"body": body})


def _fill(template: str, parts: dict[str, str]) -> str:
    """Put parts in place of their `{names}`, and of the names within the parts; leave unknown names.

    A part whose name has a line to itself is indented as that, and leaves no line if it is empty.
    """

    def block(found: re.Match[str]) -> str:
        part = parts.get(found[2])
        return found[0] if part is None else "".join(f"{found[1]}{s}\n" for s in part.splitlines())

    before = ""
    while before != template:
        before, template = template, re.sub(r"(?m)^( *)\{(\w+)\}\n", block, template)
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), template)


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> CodeType:
    """Compile a source once."""
    # Tracebacks ask no loader for a name that ends with ">".
    return compile(source, f"<opero wrapper> {next(_numbers)}", "exec")


class _Source:
    """What tracebacks and debuggers ask for the text: `linecache` itself costs a tenth of importing opero."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, name: str) -> str:
        """Return the text."""
        return self._text


_numbers = itertools.count(1)
