# this_file: src/opero/core/wrapper.py
"""Generate the function that replaces the user's: same parameters, a fast path in front of the stages.

A wrapper that names its parameters needs no `*args, **kwargs`, so that a cache hit costs a third of
what a closure needs; `dataclasses` and attrs generate functions for the same reason. The source of
one shape of parameters is compiled once, shared by all functions of that shape, and readable in
tracebacks. Names in it begin with `_opero_`, because a parameter may have the name of a builtin.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable
from time import monotonic
from types import CodeType, FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from opero.caching.keys import FAST_TYPES
from opero.caching.keys.function_keys import key_names, key_source
from opero.caching.memory import Entry, MemoryStore
from opero.core.call import Call
from opero.core.deadline import leave
from opero.core.stream import STREAMS, AsyncStream
from opero.utils.ambient import switch
from opero.utils.parameters import NoDefault, defaults_of, fill_template, write_parameters

if TYPE_CHECKING:
    from opero.core.function import FunctionInfo
    from opero.core.pipeline import Pipeline


# --- templates: the function, and what stands in place of {body} ----------------------------------

_FUNCTION: Final = """\
{async}def _wrapper({parameters}):
    {body}
"""

_STAGES: Final = "return {wait}_opero_run({new_call})"

_FAST_PATH: Final = """\
if _opero_switch.on or _opero_fast_path.closed:
    return {wait}_opero_run({new_call})
{find}
{then}
"""

# Ctrl-C may come just before something is given back. A bare `except`, because a coroutine that is collected together
# with its function finds no names any more.
_GUARDED: Final = """\
{names} = None
try:
    {guarded}
except:
    {drops}
    raise
"""

_FIRST: Final = """\
_opero_call = {early_call}
{first_call}
return {wait}_opero_run(_opero_call or {new_call})
"""

_LOOK_UP: Final = """\
_opero_call = {early_call}
{lead}
_opero_call = _opero_call or {new_call}
_opero_call.key, _opero_call.flight = _opero_key, _opero_flight
return {wait}_opero_run(_opero_call)
"""

_HIT: Final = """\
_opero_entry = _opero_get(_opero_key)
if _opero_entry is not None and _opero_entry.expires > _opero_monotonic():
    _opero_count_hit()
    _opero_entry.visited = True
    return _opero_entry.value if _opero_entry.copier is None else _opero_entry.copier(_opero_entry.value)
"""

# What a caller leads it lands, hands over to the stages, or drops.
_LEAD: Final = """\
{find_or_lead}
if _opero_flight is not None:
    {first_call}
"""

_LEAD_AT_ONCE: Final = "_opero_flight = _opero_cache.lead(_opero_key)"
_FIND_OR_LEAD: Final = """\
_opero_flight = _opero_cache.find_or_lead(_opero_key)
if _opero_isinstance(_opero_flight, _opero_Entry):
    _opero_count_hit()
    return _opero_flight.open()
"""

# No name keeps the error: a frame that does, and that the error has passed through, is a reference cycle.
_FIRST_CALL: Final = """\
_opero_count()
try:
    _opero_result = {real_call}
except _opero_Exception as _opero_error:
    _opero_call = _opero_call or {new_call}
    _opero_call.calls, _opero_call.prior_outcome = 1, _opero_error
    {late}
else:
    {succeeded}
    {land}
    return _opero_result
"""

# A thread that the call leaves behind when its time is over is noted in it.
_LEAVE_LATER: Final = "_opero_concurrency.leave(_opero_held, _opero_call)"
_IN_THREAD: Final = "_opero_timeout.run(_opero_partial(_opero_fn, {forward}), _opero_call)"

_LATE: Final = "_opero_deadline.note(_opero_call, _opero_scope)"

# The circuit's stage counts failures; a call that is interrupted does not count in a closed circuit.
_SUCCEEDED: Final = "_opero_permit.silent or _opero_permit.success(_opero_result)"

_LAND: Final = "_opero_cache.land(_opero_flight, _opero_result, _opero_store(_opero_flight, _opero_result, _opero_ttl))"

# What a first call must pass, outermost guard first. One that has to wait, or that comes while others do, waits in the
# stages, without the permit until then.
_PASSES: Final = {
    "fallback": "(_opero_value := _opero_fallback.first({parameter})) is not _opero_NoDefault",
    "circuit": "(_opero_permit := _opero_breaker.current_permit) is not None",
    "concurrency": "(_opero_held := _opero_limit.enter({task})) is not None",
    "rate_limit": "not (_opero_rate_limit.limiter.{line}_waiting or _opero_rate_limit.limiter.take_slot())",
}
_DROPS: Final = {
    "concurrency": ("_opero_held", "_opero_limit.drop(_opero_held, {task})"),
    "deadline": ("_opero_scope", "_opero_leave(_opero_scope)"),
    "cache": ("_opero_flight", "_opero_cache.drop(_opero_flight)"),
}
"""What a call that ends with an error may still have, by stage, innermost first: its name, and what gives it back."""
_AROUND: Final = {
    "concurrency": ("", "if _opero_held:\n    {leave_permit}\n    _opero_held = None"),
    "deadline": ("_opero_scope = _opero_deadline.begin()", "_opero_leave(_opero_scope)"),
}
"""What begins and ends around a first call, by stage, innermost first."""
_OF_PIPELINE: Final = (*_PASSES, "cache", "deadline", "fast_path", "run", "timeout")

_WITHIN: Final = """\
{enter}
try:
    {within}
finally:
    {leave}
"""

_BUILTINS: Final[Any] = (BaseException, Exception, id, isinstance, type, *FAST_TYPES)
_OURS: Final[Any] = (AsyncStream, Call, Entry, NoDefault, leave, monotonic, functools.partial)

_SHARED: Final[dict[str, Any]] = {
    f"_opero_{shared.__name__}": shared for shared in (*_BUILTINS, *_OURS)
} | {"_opero_switch": switch, "__builtins__": builtins}
"""What the source of every function may refer to. C code that it calls directly, as `pickle.loads`, imports with the
builtins that it finds here."""

_CALL: Final = {"new_call": "_opero_Call({args}, {kwargs})"}
_PLAIN: Final = {"async": "", "wait": "", "task": "", "line": "threads"}
_AWAITED: Final = {"async": "async ", "wait": "await ", "task": "_opero_task", "line": "loops"}


# --- functions ------------------------------------------------------------------------------------


def make_wrapper(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function that users call.

    It is a plain function with the original's parameters, defaults, name and docs; a coroutine
    function, generator function or asynchronous generator function exactly if the original is one.
    """
    info = pipeline.info
    return info.wraps(_made(_source(pipeline), info, _names(pipeline)))


def make_call(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function's `.call(...)`, which takes its arguments and gives a receipt."""
    info = pipeline.info
    # It has the function's own parameters, so that a missing argument is a TypeError at once and no
    # failure to be retried.
    body = {"body": "return _opero_receipt({new_call})"}
    source = fill_template(_FUNCTION, write_parameters(info.calling) | _CALL | _PLAIN | body)
    call = _made(source, info, {"receipt": pipeline.receipt})
    call.__name__, call.__qualname__ = "call", f"{info.qualname}.call"
    call.__doc__ = f"Call `{info.name}` and return a `Receipt`: the value and how it came about."
    return call


def _made(source: str, info: FunctionInfo, names: dict[str, Any]) -> FunctionType:
    """Make a function of its source and the names that it uses, with the name of the original."""
    scope = _SHARED | {f"_opero_{name}": value for name, value in names.items()}
    code = _compiled(source)
    # What tracebacks and debuggers ask for the text: `linecache` itself costs a tenth of importing opero.
    loader = SimpleNamespace(get_source=lambda name: source)
    scope |= {"__name__": code.co_filename, "__loader__": loader}
    made = FunctionType(code.replace(co_name=info.name, co_qualname=info.qualname), scope)
    made.__defaults__, made.__kwdefaults__ = defaults_of(info.calling)
    made.__module__ = info.module
    return made


def _names(pipeline: Pipeline) -> dict[str, Any]:
    """Return the objects of this function that the source refers to."""
    cache, stats = pipeline.cache, pipeline.stats
    names: dict[str, Any] = {name: getattr(pipeline, name) for name in _OF_PIPELINE}
    names |= {"count": stats.call_counter.count, "count_hit": stats.hit_counter.count}
    names["fn"] = pipeline.limited_function()
    names["breaker"] = pipeline.circuit and pipeline.circuit.breaker
    names["limit"] = pipeline.concurrency and pipeline.concurrency.limit
    if pipeline.concurrency is not None and pipeline.awaits:
        # Imported here: a synchronous program never pays for asyncio.
        from asyncio import current_task

        names["task"] = current_task
    if cache is not None:
        names |= {"store": cache.entries.store, "ttl": cache.ttl} | key_names(cache.keys)
        if isinstance(cache.store, MemoryStore):
            names["get"] = cache.store.entries.get
    return names


# --- source text ----------------------------------------------------------------------------------


def _source(pipeline: Pipeline) -> str:
    """Write the function of a pipeline."""
    kind, cache, fast = pipeline.info.kind, pipeline.cache, pipeline.has_fast_path
    in_thread = pipeline.timeout is not None and kind == "sync"
    name = pipeline.fallback.parameter.name if pipeline.fallback else ""
    parts = write_parameters(pipeline.info.calling, {name: "_opero_value"}) | _CALL
    parts |= _AWAITED if kind.startswith("async") else _PLAIN
    parts |= {
        "parameter": name,
        "early_call": "{new_call}" if in_thread else "None",
        "real_call": _IN_THREAD if in_thread else "{wait}_opero_fn({forward})",
        "late": "" if pipeline.deadline is None else _LATE,
        "succeeded": "" if pipeline.circuit is None else _SUCCEEDED,
        "land": "" if cache is None else _LAND,
        # A thread that is left behind keeps the permit; the call knows it.
        "leave_permit": _LEAVE_LATER if in_thread else "_opero_limit.leave(_opero_held)",
        "first_call": _first_call(pipeline),
    }
    find, then = "", _FIRST if fast else _STAGES
    if cache is not None and (cache.in_memory or fast):
        find, then = key_source(cache.keys, typed=cache.in_memory), _LOOK_UP
        find += _HIT if cache.in_memory else ""
        parts["lead"] = _LEAD if fast else "_opero_flight = None"
        parts["find_or_lead"] = _LEAD_AT_ONCE if cache.in_memory else _FIND_OR_LEAD
    drops = dict(drop for stage, drop in _DROPS.items() if getattr(pipeline, stage) is not None)
    if fast and drops:
        parts |= {"names": " = ".join(drops), "guarded": then, "drops": "\n".join(drops.values())}
        then = _GUARDED
    parts |= {"find": find, "then": then, "body": STREAMS.get(kind, _FAST_PATH)}
    return fill_template(_FUNCTION, parts)


def _first_call(pipeline: Pipeline) -> str:
    """Write the first call of a function with its guards around it."""
    body = _FIRST_CALL
    passes = [test for guard, test in _PASSES.items() if getattr(pipeline, guard) is not None]
    if passes:
        body = fill_template(
            "if {passes}:\n    {body}\n", {"passes": " and ".join(passes), "body": body}
        )
    for stage, (enter, leave_stage) in _AROUND.items():
        if getattr(pipeline, stage) is not None:
            body = fill_template(_WITHIN, {"enter": enter, "within": body, "leave": leave_stage})
    return body


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> CodeType:
    """Return the code of the function that a source defines."""
    # Not by `compile`, which first makes the hundred classes of `ast`: a tenth of what importing opero costs.
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102 - our template, names only
    made: FunctionType = names["_wrapper"]
    # Tracebacks ask no loader for a name that ends with ">".
    return made.__code__.replace(co_filename=f"<opero wrapper> {hash(source):x}")
