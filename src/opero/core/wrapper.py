# this_file: src/opero/core/wrapper.py
"""Generate the function that replaces the user's: same parameters, a fast path in front of the stages.

A wrapper that names its parameters needs no `*args, **kwargs`, so that a cache hit costs a third of
what a closure needs; `dataclasses` and attrs generate functions for the same reason. The source of
one shape of parameters is compiled once, shared by all functions of that shape, and readable in
tracebacks. Names in it begin with `_opero_`, because a parameter may have the name of a builtin.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import linecache
import time
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final

from opero.caching.keys import FAST_TYPES
from opero.caching.keys.function_keys import short_part
from opero.core.call import Call
from opero.core.deadline import leave
from opero.core.function import stars, unwrap_partial
from opero.core.stream import AsyncStream
from opero.utils.ambient import switch

if TYPE_CHECKING:
    from opero.core.pipeline import Pipeline

__all__ = ["has_fast_path", "is_unguarded", "make_call", "make_wrapper"]

# --- templates: the function, and what stands in place of {inner} ---------------------------------

_FUNCTION: Final = """\
{define} _wrapper({parameters}):
    if _opero_switch.on or _opero_fast_path.closed:
        return {wait}_opero_run(_opero_Call({args}, {kwargs}))
    {inner}
"""

_STAGES: Final = "return {wait}_opero_run(_opero_Call({args}, {kwargs}))\n"

# The types of all arguments are compared before their values: 1, True and 1.0 are different calls.
_HIT: Final = """\
if {all_fast}:
    _opero_key = ({key},)
    _opero_entry = _opero_get(_opero_key)
    if _opero_entry is not None and _opero_entry.expires > _opero_now():
        _opero_count_hit()
        _opero_entry.visited = True
        if _opero_entry.copier is None:
            return _opero_entry.value
        return _opero_entry.copier(_opero_entry.value)
    _opero_call = _opero_Call({args}, {kwargs})
    _opero_call.key = _opero_key
    return {wait}_opero_run(_opero_call)
return {wait}_opero_run(_opero_Call({args}, {kwargs}))
"""

# No name keeps the error: a frame that does, and that the error has passed through, is a reference
# cycle. A call that its deadline has cut short has not failed, and what it used of its time is used.
_FIRST_CALL: Final = """\
_opero_count()
try:
    _opero_result = {wait}_opero_fn({forward})
except _opero_Exception as _opero_error:
    _opero_call = _opero_Call({args}, {kwargs})
    _opero_call.calls = 1
    _opero_call.prior_outcome = _opero_error
    {late}
else:
    {succeeded}
    return _opero_result
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

# Innermost first. A call that has to wait, or that comes while others do, waits in the stages, without
# the permit until then.
_GUARDS: Final = {
    "rate_limit": """\
if _opero_limiter.{line} or _opero_limiter.take_slot():
    _opero_call = _opero_Call({args}, {kwargs})
else:
    {inner}
""",
    "concurrency": """\
_opero_held = _opero_limit.enter({task})
if _opero_held is None:
    return {wait}_opero_run(_opero_Call({args}, {kwargs}))
try:
    {inner}
finally:
    _opero_limit.leave(_opero_held)
""",
    "circuit": """\
_opero_permit = _opero_breaker.current_permit
if _opero_permit is None:
    return {wait}_opero_run(_opero_Call({args}, {kwargs}))
{inner}
""",
    "deadline": """\
_opero_scope = _opero_begin()
try:
    {inner}
finally:
    _opero_leave(_opero_scope)
""",
}

_CONTINUE: Final = "return {wait}_opero_run(_opero_call)\n"

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


# --- decisions ------------------------------------------------------------------------------------


def has_fast_path(pipeline: Pipeline) -> bool:
    """Whether a wrapper may make the first call before any stage runs: only retry and guards are on.

    A synchronous call with a timeout is made in a thread by its stage.
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
    """Whether the fast path is nothing but the first call itself."""
    guards = (*_GUARDS, "timeout")
    return has_fast_path(pipeline) and all(getattr(pipeline, name) is None for name in guards)


# --- functions ------------------------------------------------------------------------------------


def make_wrapper(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function that users call.

    It is a plain function with the original's parameters, defaults, name and docs; a coroutine
    function, generator function or asynchronous generator function exactly if the original is one.
    """
    info = pipeline.info
    parameters = list(info.calling.parameters.values())
    wrapper = _made(_source(pipeline, parameters), parameters, _names(pipeline, parameters))
    wrapper.__code__ = wrapper.__code__.replace(co_name=info.name, co_qualname=info.qualname)
    wrapper.__name__, wrapper.__qualname__ = info.name, info.qualname
    wrapper.__module__ = info.module
    if inspect.isroutine(info.fn):
        return functools.update_wrapper(wrapper, info.fn)
    # What a class, an object or a partial carries is its own and not the function's.
    wrapper.__doc__ = unwrap_partial(info.fn).__doc__
    return functools.update_wrapper(wrapper, info.fn, assigned=(), updated=())


def make_call(pipeline: Pipeline) -> Callable[..., Any]:
    """Return the function's `.call(...)`, which takes its arguments and gives a receipt."""
    info = pipeline.info
    parameters = list(info.calling.parameters.values())
    names = {"_opero_receipt": pipeline.receipt, "_opero_Call": Call}
    call = _made(_RECEIPT.format(**_written(parameters)), parameters, names)
    call.__name__, call.__qualname__, call.__module__ = "call", f"{info.qualname}.call", info.module
    call.__doc__ = f"Call `{info.name}` and return a `Receipt`: the value and how it came about."
    return call


def _made(source: str, parameters: list[inspect.Parameter], names: dict[str, Any]) -> FunctionType:
    """Make a function of its source, its parameters' defaults and the names that it uses."""
    defaults = {f"_opero_default_{n}": p.default for n, p in enumerate(parameters)}
    scope: dict[str, Any] = {}
    exec(_compiled(source), names | defaults, scope)  # noqa: S102 - our template, names only
    made: FunctionType = scope["_wrapper"]
    return made


def _names(pipeline: Pipeline, parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """Return the objects that the source refers to."""
    cache, limit, deadline = pipeline.cache, pipeline.rate_limit, pipeline.deadline
    current_task: Any = None
    if pipeline.concurrency is not None and pipeline.awaits:
        # Imported here: a synchronous program never pays for asyncio.
        import asyncio

        current_task = asyncio.current_task
    names: dict[str, Any] = {
        "_opero_switch": switch,
        "_opero_fast_path": pipeline.fast_path,
        "_opero_run": pipeline.run,
        "_opero_Call": Call,
        "_opero_count": pipeline.stats.call_counter.count,
        "_opero_Exception": Exception,
        "_opero_BaseException": BaseException,
        "_opero_GeneratorExit": GeneratorExit,
        "_opero_AsyncStream": AsyncStream,
        "_opero_fn": pipeline.limited_function(),
        "_opero_limiter": limit and limit.limiter,
        "_opero_limit": pipeline.concurrency and pipeline.concurrency.limit,
        "_opero_current_task": current_task,
        "_opero_breaker": pipeline.circuit and pipeline.circuit.breaker,
        "_opero_begin": deadline and deadline.begin,
        "_opero_budget": deadline and deadline.seconds,
        "_opero_leave": leave,
    }
    if cache is not None:
        names |= {
            "_opero_get": cache.fast_get,
            "_opero_now": time.monotonic,
            "_opero_count_hit": pipeline.stats.hit_counter.count,
            "_opero_type": type,
            "_opero_id": id,
            "_opero_token": cache.token_get,
        }
        names |= {f"_opero_{kind.__name__}": kind for kind in FAST_TYPES}
        for n, part in _default_parts(parameters).items():
            names |= {f"_opero_part_{n}": part, f"_opero_copy_{n}": list(part[1])}
    return names


# --- source text ----------------------------------------------------------------------------------


def _source(pipeline: Pipeline, parameters: list[inspect.Parameter]) -> str:
    kind, cache = pipeline.info.kind, pipeline.cache
    blanks = _written(parameters)
    awaited = kind == "async"
    blanks |= (
        {"define": "async def", "wait": "await "} if awaited else {"define": "def", "wait": ""}
    )
    blanks["task"] = "_opero_current_task" if awaited else ""
    blanks["line"] = "loops_waiting" if awaited else "threads_waiting"
    if kind == "generator":
        return _GENERATOR.format(**blanks)
    if kind == "async_generator":
        return _ASYNC_GENERATOR.format(**blanks)
    body = _guarded_call(pipeline) if has_fast_path(pipeline) else _STAGES
    if cache is not None and cache.fast_parameters:
        body = _HIT
        blanks |= _key(cache.fast_parameters, parameters, of_instance=cache.of_instance)
    return _put(_FUNCTION, inner=body).format(**blanks)


def _guarded_call(pipeline: Pipeline) -> str:
    """Write the first call, within the guards that are on."""
    body = _put(
        _FIRST_CALL,
        late="" if pipeline.deadline is None else _LATE,
        succeeded="" if pipeline.circuit is None else _SUCCEEDED,
    )
    for name, guard in _GUARDS.items():
        if getattr(pipeline, name) is not None:
            body = _put(guard, inner=body)
    return body + _CONTINUE


def _put(template: str, **blocks: str) -> str:
    """Replace lines that are nothing but the name of a block by the block, indented as they are."""
    lines: list[str] = []
    for line in template.splitlines(keepends=True):
        margin, name = line[: line.find("{")], line.strip("{} \n")
        if f"{{{name}}}" == line.strip() and name in blocks:
            lines += [margin + inner for inner in blocks[name].splitlines(keepends=True)]
        else:
            lines.append(line)
    return "".join(lines)


def _written(parameters: list[inspect.Parameter]) -> dict[str, str]:
    """Write parameters as in a `def`, without annotations and with defaults by reference, and as arguments."""
    declared, names, items, pairs = list[str](), list[str](), list[str](), list[str]()
    kinds = [p.kind for p in parameters]
    for n, p in enumerate(parameters):
        if p.kind is p.KEYWORD_ONLY:
            if p.VAR_POSITIONAL not in kinds and kinds.index(p.KEYWORD_ONLY) == n:
                declared.append("*")
            items.append(f"{p.name!r}: {p.name}")
            pairs.append(f"{p.name}={p.name}")
        elif p.kind is p.VAR_KEYWORD:
            items.append(f"**{p.name}")
            pairs.append(f"**{p.name}")
        else:
            names.append(stars(p) + p.name)
        default = "" if p.default is p.empty else f"=_opero_default_{n}"
        declared.append(stars(p) + p.name + default)
        if p.kind is p.POSITIONAL_ONLY and kinds[n + 1 : n + 2] != [p.POSITIONAL_ONLY]:
            declared.append("/")
    return {
        "parameters": ", ".join(declared),
        "args": f"({', '.join(names)}{',' * (len(names) == 1)})",
        "kwargs": f"{{{', '.join(items)}}}",
        "forward": ", ".join([*names, *pairs]),
    }


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
    """Write the key of a hit and the test that it may be used; its shape is `opero.caching.keys.function_keys`'s."""
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
            # Only the default itself: its items need no comparison, unless it is a list, which may be changed.
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
    """Compile a source once and leave its text where tracebacks and debuggers look for it."""
    name = f"<opero wrapper {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return compile(source, name, "exec")


_numbers = itertools.count(1)
