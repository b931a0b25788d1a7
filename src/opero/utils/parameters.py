# this_file: src/opero/utils/parameters.py
"""Read the parameters of a callable, and write source text with them.

Those of a plain function are read from its code. Everything else that can be called is left to
`inspect`, which costs as much to import as all modules of the pipeline together.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Final

from opero.utils.lazy import NamedTuple

# The kinds have the order and the numbers of those in `inspect`.
POSITIONAL_ONLY: Final = 0
POSITIONAL_OR_KEYWORD: Final = 1
VAR_POSITIONAL: Final = 2
KEYWORD_ONLY: Final = 3
VAR_KEYWORD: Final = 4

_TAKES_ARGS: Final = 0x04
_TAKES_KWARGS: Final = 0x08
"""Flags of code that has `*args`, `**kwargs` (`inspect.CO_VARARGS`, `inspect.CO_VARKEYWORDS`)."""


class NoDefault:
    """Stands, as a class, where a parameter has no default."""


class Parameter(NamedTuple):
    """One parameter of a function.

    Attributes:
        name: Its name, without stars.
        kind: One of the constants above.
        default: Its default, `NoDefault` if there is none.
    """

    name: str
    kind: int = POSITIONAL_OR_KEYWORD
    default: Any = NoDefault


ANYTHING: Final = (Parameter("args", VAR_POSITIONAL), Parameter("kwargs", VAR_KEYWORD))


def unwrap_partial(fn: Callable[..., Any]) -> Any:
    """Return what stands inside all layers of `functools.partial`: it has the name and the docs."""
    while isinstance(fn, partial):
        fn = fn.func
    return fn


def is_bare(fn: object) -> bool:
    """Return whether something is a plain function with no attributes, so that its code says all about it."""
    return type(fn) is FunctionType and not fn.__dict__


def shown_parameters(fn: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Return the parameters that users see: those of the innermost wrapped function.

    Some builtins do not know theirs; they are said to take anything.
    """
    return _of_code(fn) if is_bare(fn) else _inspected(fn, follow_wrapped=True)


def called_parameters(fn: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Return the parameters with which `fn` is really called; anything, if they cannot be written down.

    What a function says of itself may hide parameters; what is called is its code.
    """
    has_code = isinstance(fn, FunctionType) and isinstance(fn.__code__, CodeType)
    found = _of_code(fn) if has_code else _inspected(fn, follow_wrapped=False)
    return found if all(_can_be_written(p.name) for p in found) else ANYTHING


def _of_code(fn: Any) -> tuple[Parameter, ...]:
    code = fn.__code__
    names, positional = code.co_varnames, code.co_argcount
    starred = positional + code.co_kwonlyargcount
    defaults, keyword_defaults = fn.__defaults__ or (), fn.__kwdefaults__ or {}
    without = positional - len(defaults)
    found = [
        Parameter(
            name,
            POSITIONAL_ONLY if n < code.co_posonlyargcount else POSITIONAL_OR_KEYWORD,
            defaults[n - without] if n >= without else NoDefault,
        )
        for n, name in enumerate(names[:positional])
    ]
    if code.co_flags & _TAKES_ARGS:
        found.append(Parameter(names[starred], VAR_POSITIONAL))
    found += [
        Parameter(name, KEYWORD_ONLY, keyword_defaults.get(name, NoDefault))
        for name in names[positional:starred]
    ]
    if code.co_flags & _TAKES_KWARGS:
        last = starred + bool(code.co_flags & _TAKES_ARGS)
        found.append(Parameter(names[last], VAR_KEYWORD))
    return tuple(found)


def _inspected(fn: Callable[..., Any], *, follow_wrapped: bool) -> tuple[Parameter, ...]:
    import inspect

    try:
        found = inspect.signature(fn, follow_wrapped=follow_wrapped).parameters.values()
    except (TypeError, ValueError):
        return ANYTHING
    return tuple(
        Parameter(p.name, int(p.kind), NoDefault if p.default is p.empty else p.default)
        for p in found
    )


def _can_be_written(name: str) -> bool:
    """Return whether generated code may have a parameter of that name; its own names begin so too."""
    return name.isidentifier() and not (keyword.iskeyword(name) or name.startswith("_opero_"))


def defaults_of(parameters: Sequence[Parameter]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a function with these parameters has as `__defaults__` and `__kwdefaults__`."""
    given = [p for p in parameters if p.default is not NoDefault]
    by_name = {p.name: p.default for p in given if p.kind == KEYWORD_ONLY}
    return tuple(p.default for p in given if p.kind != KEYWORD_ONLY), by_name


def stars(parameter: Parameter) -> str:
    """Return what stands before a parameter's name in a `def`."""
    return {VAR_POSITIONAL: "*", VAR_KEYWORD: "**"}.get(parameter.kind, "")


def write_parameters(
    parameters: Sequence[Parameter], sent: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write parameters as in a `def`, without annotations and defaults, and as arguments.

    Args:
        parameters: The parameters.
        sent: What the call gets for some of them, by name, instead of what was given.
    """
    given = {p.name: p.name for p in parameters} | dict(sent or {})
    declared: list[str] = []
    before = POSITIONAL_OR_KEYWORD
    for p in parameters:
        if before == POSITIONAL_ONLY != p.kind:
            declared.append("/")
        if p.kind == KEYWORD_ONLY and before < VAR_POSITIONAL:
            declared.append("*")
        declared.append(stars(p) + p.name)
        before = p.kind
    if before == POSITIONAL_ONLY:
        declared.append("/")
    positional = [stars(p) + p.name for p in parameters if p.kind < KEYWORD_ONLY]
    keywords = [p for p in parameters if p.kind >= KEYWORD_ONLY]
    items = [f"**{p.name}" if stars(p) else f"{p.name!r}: {p.name}" for p in keywords]
    forward = [stars(p) + given[p.name] for p in parameters if p.kind < KEYWORD_ONLY]
    forward += [f"**{p.name}" if stars(p) else f"{p.name}={given[p.name]}" for p in keywords]
    return {
        "parameters": ", ".join(declared),
        "args": f"({', '.join(positional)}{',' * (len(positional) == 1)})",
        "kwargs": f"{{{', '.join(items)}}}",
        "forward": ", ".join(forward),
    }


def fill_template(template: str, parts: dict[str, str]) -> str:
    """Put parts in place of their `{names}`, and of the names within the parts; leave unknown names.

    A part whose name has a line to itself is indented as that, and leaves no line if it is empty.
    """

    def put(found: re.Match[str]) -> str:
        part = parts.get(found[2] or found[3])
        if part is None or found[3]:
            return found[0] if part is None else part
        return "".join(f"{found[1]}{line}\n" for line in part.splitlines())

    before = ""
    while before != template:
        before, template = template, re.sub(r"(?m)^( *)\{(\w+)\}\n|\{(\w+)\}", put, template)
    return template
