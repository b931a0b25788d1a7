# this_file: src/opero/caching/keys/function_keys.py
"""Turn the arguments of a call into the key of its result.

In memory, entries belong to the function object, and a key is one of:

    (str, "a", int, 3)        types and values in declared order, if all types are in `FAST_TYPES`
    (list, ((int,), (1,)))    floats and short plain sequences likewise
    b"…20 bytes…"             digest of ((name, value), …)
    (7, str, "a")             a method: the token of the instance, then as above
    (7, b"…20 bytes…")

Wrappers build the first and the third shape by source text of `key_source`, so both places must agree.
Stores that functions share get text: namespace, the function's persistent identity, and always the
digest.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import count
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, Final

from opero.caching.keys.canonical import FAST_TYPES, digest, fast_part, pair_head, pairs_digest
from opero.caching.keys.content import Unkeyable
from opero.errors import StoreError, UnkeyableError
from opero.utils import ambient
from opero.utils.parameters import (
    KEYWORD_ONLY,
    POSITIONAL_OR_KEYWORD,
    VAR_KEYWORD,
    VAR_POSITIONAL,
    Parameter,
)


class FunctionKeys:
    """Make the keys of one function's results.

    Args:
        info: The function, as `core.function` describes it.
        ignore: Parameters left out.
        user_key: Gets the call's arguments and returns the whole key, or None.
        instances: Numbers the instances that have no content, for a method in memory; None: they
            are unkeyable.
        prefix: Gives the text before the digest, for a store that functions share; None: keys for
            memory.

    Attributes:
        function: What is known of the function.
        prefix: As above.
        instances: As above; keys begin with the token of an instance then, unless it has content.

    Raises:
        OperoUsageError: `ignore` names no parameter.
    """

    def __init__(
        self,
        info: Any,
        *,
        ignore: Iterable[str] = (),
        user_key: Callable[..., object] | None = None,
        instances: InstanceTokens | None = None,
        prefix: Callable[[], str] | None = None,
    ) -> None:
        parameters: tuple[Parameter, ...] = info.parameters
        self.function = info
        self._ignore = frozenset(ignore)
        self._any_keyword = any(p.kind == VAR_KEYWORD for p in parameters)
        if not self._any_keyword:
            for name in self._ignore:
                info.require_parameter(name, "cache_ignore")
        self._user_key = user_key
        self.prefix = prefix
        self._names = tuple(p.name for p in parameters)
        kinds = {p.kind for p in parameters}
        # A wrapper hands all arguments on in full; then nothing needs to be bound.
        self._plain = _called_as_declared(info) and not kinds & _STARRED
        self._positional = sum(p.kind <= POSITIONAL_OR_KEYWORD for p in parameters)
        self._keyword_only = tuple(p.name for p in parameters if p.kind == KEYWORD_ONLY)
        self._kept = [n for n, name in enumerate(self._names) if name not in self._ignore]
        self._heads = [pair_head(self._names[n]) for n in self._kept]
        self.instances: InstanceTokens | None = instances if self._kept[:1] == [0] else None
        self._bare = self._plain and not self._keyword_only

    @property
    def fast_parameters(self) -> tuple[str, ...]:
        """Names of the parameters from which a wrapper may build a key itself; empty if none."""
        if not self._plain or self._user_key is not None or self.prefix is not None:
            return ()
        return tuple(self._names[n] for n in self._kept)

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
        """Return the key of a call, None if its arguments do not fit the function.

        Raises:
            UnkeyableError: An argument has no content; the message names it and the ways out.
        """
        if self._user_key is not None:
            return self._from_user(self._user_key, args, kwargs)
        sent = self._bare and not kwargs and len(args) == self._positional
        values = args if sent else self._bound(args, kwargs)
        if values is None:
            return None
        if self.instances is not None:
            return self._of_instance(values, self.instances)
        return self._of_content(values)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the values of all parameters, None if the arguments do not fit."""
        sent = self._plain and len(args) == self._positional  # by a wrapper, in full
        if sent and kwargs.keys() == set(self._keyword_only):
            return (*args, *(kwargs[name] for name in self._keyword_only))
        try:
            bound = self.function.declared.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        values = bound.arguments
        if self._any_keyword:
            given = values[self._names[-1]]
            values[self._names[-1]] = {n: v for n, v in given.items() if n not in self._ignore}
        return tuple(values.values())

    def edit_detector(self, store: Any) -> Callable[[], bool]:
        """Return the check whether the function was edited since its entries were stored.

        The entries are kept, because a batch that is resumed after a small change must not pay twice. A digest
        of the code lies beside the entries, one for each version of Python.

        Args:
            store: The `CodedStore` where the entries are.
        """

        def look() -> bool:
            now = code_digest(self.function.fn)
            if now is None or self.prefix is None:
                return False
            key = f"~code:{sys.hexversion:x}.{sys.flags.optimize}:{self.prefix()}"
            try:
                then = store.backend.get(key)
                if then != now:
                    store.backend.set(key, now, None)
            except StoreError:  # the lookup reports a store that fails
                return False
            return then not in (now, None)

        return look

    # --- shapes -----------------------------------------------------------------------------------

    def _of_content(self, values: tuple[Any, ...], first: int = 0) -> Hashable:
        """Return the key of the arguments from number `first` on."""
        kept = self._kept[first:] if first else self._kept
        if self.prefix is None:
            flat: list[Any] = []
            try:
                for n in kept:
                    value = values[n]
                    kind = type(value)
                    if kind not in FAST_TYPES:
                        value = short_part(kind, value)
                        if value is None:
                            break
                    flat += kind, value
                else:
                    return tuple(flat)
            except TypeError:
                pass  # a metaclass may make its classes unhashable
        heads = self._heads
        try:
            found = pairs_digest(heads[first:] if first else heads, [values[n] for n in kept])
        except Unkeyable as signal:
            name = self._names[kept[int(signal.path[0])]]
            raise self._unkeyable(name, _described(name, signal.path[1:], signal)) from None
        return found if self.prefix is None else f"{self.prefix()}{found.hex()}"

    def _of_instance(self, values: tuple[Any, ...], instances: InstanceTokens) -> Hashable:
        instance = values[0]
        token = instances.tokens.get(id(instance))
        if token is None:
            if not isinstance(instance, type) and _has_content(instance):
                return self._of_content(values)
            try:
                token = instances.token(instance)
            except TypeError:
                raise self._unkeyable(
                    self._names[0],
                    f"{type(instance).__qualname__} has neither content nor weak references",
                ) from None
        others = self._of_content(values, first=1)
        return (token, *others) if isinstance(others, tuple) else (token, others)

    def _from_user(
        self, user_key: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hashable | None:
        try:
            made = user_key(*args, **kwargs)
        except TypeError:
            if self._bound(args, kwargs) is None:
                return None  # the function itself raises what is wrong with its arguments
            raise
        try:
            if self.prefix is None:
                return fast_part(made)
            return f"{self.prefix()}{digest(made).hex()}"
        except Unkeyable as signal:
            raise UnkeyableError(
                f"{self.function.name}(): cache_key returned what cannot be a key: {signal}. "
                "Return text, numbers, or a tuple of them."
            ) from None

    def _unkeyable(self, name: str, why: str) -> UnkeyableError:
        return UnkeyableError(
            f"{self.function.name}(): the argument {name!r} cannot be part of a cache key: {why}. "
            f"Leave it out with cache_ignore=({name!r},), build the key yourself with cache_key=…, "
            "or switch the cache off with cache=False."
        )


_MOST_LAYERS: Final = 100
"""Decorators of one function that are looked through."""

_SHORT: Final = 16
"""Longest list or tuple that is not worth a digest."""

_STARRED: Final = frozenset({VAR_POSITIONAL, VAR_KEYWORD})


def _called_as_declared(info: Any) -> bool:
    declared, calling = info.parameters, info.calling
    # As a whole they would compare defaults with `==`, which arrays refuse to answer.
    return len(declared) == len(calling) and all(
        d.name == c.name and d.kind == c.kind and d.default is c.default
        for d, c in zip(declared, calling, strict=True)
    )


def _has_content(instance: object) -> bool:
    try:
        digest(instance)
    except Unkeyable:
        return False
    return True


def _described(name: str, path: tuple[str | int, ...], signal: Unkeyable) -> str:
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{f'{name}{steps} is ' if steps else ''}{signal.culprit}, which {signal.reason}"


def namespace_prefix(namespace: str) -> str:
    """Return what all keys of a namespace begin with in stores that functions share.

    Example:
        >>> namespace_prefix("geo"), namespace_prefix("geo:eu")
        ('geo:', 'geo%3Aeu:')
    """
    return f"{_escaped(namespace)}:"


def namespace_of(key: str) -> str:
    """Return the namespace of a key in such a store.

    Example:
        >>> namespace_of("geo%3Aeu:module.locate:0f3a")
        'geo:eu'
    """
    from urllib.parse import unquote

    return unquote(key.partition(":")[0])


_SPECIAL: Final = str.maketrans({"%": "%25", ":": "%3A", "~": "%7E"})


def _escaped(text: str) -> str:
    """Return a part of a key in which nothing looks like the end of the part, or like no entry."""
    # The path of a script may hold bytes that are no text.
    return text.translate(_SPECIAL).encode(errors="backslashreplace").decode()


def function_id(info: Any, version: str | int | None = None) -> str:
    """Return what a function is called in stores that outlive or are shared by functions.

    It is made of the module (for a script, its file), the qualified name, and what distinguishes two
    functions of one name: closure contents and what `functools.partial` or a method has bound. Its
    code is no part of it, unless it is a lambda: editing a function keeps its entries.

    Args:
        info: The function, as above.
        version: `cache_version`.

    Raises:
        UnkeyableError: Something it closes over has no content.
    """
    module = info.module
    if module in ("__main__", "__mp_main__"):
        module = ambient.main_script() or module
    name = f"{_escaped(module)}:{info.qualname}"
    if info.name == "<lambda>" and (code := code_digest(info.fn)) is not None:
        name += f"={code.decode()}"  # it has no name that distinguishes it from others
    bound = bound_to(info.fn)
    if bound:
        try:
            name += f"#{digest(bound).hex()}"
        except Unkeyable as signal:
            signal.path = signal.path[1:]
            raise UnkeyableError(
                f"{info.name}() cannot be told apart from others of its name in a store that functions share or a "
                f"checkpoint: it is bound to something without content ({signal}). Pass that as an argument which "
                'cache_ignore=(…) leaves out, or use cache_backend="memory" and no checkpoint.'
            ) from None
    return name if version is None else f"{name}@{_escaped(str(version))}"


_EMPTY_CELL: Final = CellType()


def bound_to(fn: Any) -> list[Any]:
    """Return what distinguishes two functions of one name.

    That is, for each `functools.partial` around it, a tuple of its positional and its keyword arguments, then the
    instance of a method or the callable object itself, then a dict of closure contents.
    """
    found: list[Any] = []
    while isinstance(fn, functools.partial):
        found.append((fn.args, fn.keywords))
        fn = fn.func
    if isinstance(fn, MethodType):
        found.append(fn.__self__)
        fn = fn.__func__
    if not isinstance(fn, FunctionType):
        # A callable object is what it holds; a builtin is its name.
        return found if hasattr(fn, "__name__") else [*found, fn]
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    # A recursive function closes over itself, which distinguishes nothing.
    cells.pop(fn.__name__, None)
    held = {name: cell.cell_contents for name, cell in cells.items() if cell != _EMPTY_CELL}
    return [*found, held] if held else found


def code_digest(fn: Any) -> bytes | None:
    """Return a digest of what a function does, None if it is not written in Python.

    Neither comments nor the decorators before its `def` count.
    """
    for _ in range(_MOST_LAYERS):  # a function may say that it wraps itself
        inner = fn.func if isinstance(fn, functools.partial) else getattr(fn, "__wrapped__", None)
        if inner is None:
            break
        fn = inner
    code = getattr(fn if hasattr(fn, "__code__") else type(fn).__call__, "__code__", None)
    if code is None:
        return None
    try:
        return digest(_code_parts(code)).hex().encode()
    except Unkeyable:  # what rewrites code may put anything into it
        return None


def _code_parts(code: CodeType) -> tuple[Any, ...]:
    constants = [_code_parts(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return code.co_name, code.co_code, code.co_names, code.co_varnames, constants


def short_part(kind: type, value: Any) -> Hashable | None:
    """Return the part of a key in memory for a float, or for a short list or tuple.

    It distinguishes types and content as exactly as a digest does, at a tenth of the cost; None where
    it could not.
    """
    if kind is float:
        # NaN does not equal itself, and 0.0 equals -0.0.
        return value if value and value == value else None
    if kind in (tuple, list) and len(value) <= _SHORT and FAST_TYPES.issuperset(map(type, value)):
        return tuple(map(type, value)), tuple(value)
    return None


# --- instances, for methods in memory -------------------------------------------------------------


class InstanceTokens:
    """Tokens of live objects, by identity: an object's own `__eq__` and `__hash__` are never called.

    An id is used again only after its object is gone, and the token goes with the object, so the
    two never disagree.

    Args:
        forget: Called with the token of an object that has died.

    Attributes:
        tokens: Token by `id(object)`. Never replaced, so that its `get` can be kept.
        references: What calls back when an object has died, likewise.
        forget: As above.

    Example:
        >>> class Client: ...
        >>> client, numbers = Client(), InstanceTokens(forget=print)
        >>> numbers.token(client) == numbers.token(client)
        True
        >>> del client
        1
    """

    def __init__(self, forget: Callable[[int], object]) -> None:
        self.tokens: dict[int, int] = {}
        self.references: dict[int, weakref.ref[object]] = {}
        self._numbers = count(1)
        self.forget: Callable[[int], object] = forget

    def token(self, instance: object) -> int:
        """Return the number of an object, a new one when it is first seen.

        Raises:
            TypeError: The object cannot be weakly referenced.
        """
        number = id(instance)
        token = self.tokens.get(number)
        if token is None:
            # Weakly: the references would otherwise keep this object in a cycle. Of two threads that come
            # here at once, the second replaces the reference of the first, and gets the same token.
            gone = functools.partial(_drop_token, weakref.ref(self), number)
            self.references[number] = weakref.ref(instance, gone)
            token = self.tokens.setdefault(number, next(self._numbers))
        return token


def _drop_token(owner: weakref.ref[InstanceTokens], number: int, _: object) -> None:
    """Forget an object that is gone."""
    if (tokens := owner()) is not None:
        del tokens.references[number]
        tokens.forget(tokens.tokens.pop(number))


# --- the same as source text ----------------------------------------------------------------------

_BY_FREQUENCY = (str, int, *sorted(FAST_TYPES - {str, int}, key=lambda kind: kind.__name__))


def default_parts(parameters: Sequence[Parameter]) -> dict[int, Any]:
    """Return the key parts of defaults that are short lists or tuples, such as the values of a fallback, by place."""
    found = {}
    for n, p in enumerate(parameters):
        part = short_part(type(p.default), p.default) if type(p.default) in (list, tuple) else None
        if part is not None:
            found[n] = part
    return found


def key_names(keys: FunctionKeys) -> dict[str, Any]:
    """Return the objects that the text of `key_source` refers to beside the cache and the types, without `_opero_`."""
    parameters = keys.function.calling
    parts = default_parts(parameters)
    found: dict[str, Any] = {f"default_{n}": p.default for n, p in enumerate(parameters)}
    found |= {f"part_{n}": part for n, part in parts.items()}
    if keys.instances is not None:
        found["token"] = keys.instances.tokens.get
    return found | {f"copy_{n}": list(part[1]) for n, part in parts.items()}


def key_source(keys: FunctionKeys, *, typed: bool) -> str:
    """Write, for a generated wrapper, the statement that makes the key of a call.

    Names other than the parameters' begin with `_opero_`: the type of parameter n, its default, the default's key part.

    Args:
        keys: What makes the keys of the function.
        typed: Whether the key is made at once, of types and values, where all values are plain.
    """
    any_other = "_opero_key = _opero_cache.key({args}, {kwargs})\n"
    names, parameters = keys.fast_parameters, keys.function.calling
    if not (typed and names):
        return any_other
    tests, parts = [], []
    places = {p.name: n for n, p in enumerate(parameters)}
    of_defaults = default_parts(parameters)
    for name in names:
        n, part = places[name], name
        # Compared one by one: a metaclass may make its classes unhashable, and `in` a set fail.
        kinds = [f"_opero_type_{n} is _opero_{kind.__name__}" for kind in _BY_FREQUENCY]
        if n in of_defaults:
            # Only the default itself: its items need no comparison, unless it is a list, which may be changed.
            same = f"_opero_type_{n} is not None and {name} is _opero_default_{n}"
            if type(parameters[n].default) is list:
                same += f" and {name} == _opero_copy_{n}"
            kinds.insert(0, same)
            part = f"_opero_part_{n} if {name} is _opero_default_{n} else {name}"
        tested = " or ".join(kinds)
        assigned = f"(_opero_type_{n} := _opero_type({name}))"
        tests.append(f"({tested.replace(f'_opero_type_{n}', assigned, 1)})")
        parts.append(f"_opero_type_{n}, {part}")
    if keys.instances is not None:
        tests[0] = f"(_opero_instance := _opero_token(_opero_id({names[0]}))) is not None"
        parts[0] = "_opero_instance"
    # The types of all arguments are compared before their values: 1, True and 1.0 are different calls.
    tested, key = " and ".join(tests), ", ".join(parts)
    return f"if {tested}:\n    _opero_key = ({key},)\nelse:\n    {any_other}"
