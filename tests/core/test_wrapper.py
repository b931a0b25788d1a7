# this_file: tests/core/test_wrapper.py
"""The function that replaces the user's: same parameters, names, docs and source."""

from __future__ import annotations

import asyncio
import builtins
import copy
import doctest
import functools
import gc
import inspect
import keyword
import pickle
import random
import sys
import traceback
import typing
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero import opero

quick = opero(cache=False, min_delay=0)
everything = opero(retries=1, min_delay=0, rate_limit=1e6)

WAYS = {"retry": quick, "cache": opero(min_delay=0), "all": everything}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    """Each of the bodies that a wrapper can have."""
    return WAYS[request.param]


class Odd:
    """A default with an identity, and no content that a cache key could be made of."""

    __hash__ = None  # type: ignore[assignment]


ODD = Odd()
LIST: list[int] = []


# --- arguments ------------------------------------------------------------------------------------


def shape_of(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def test_defaults_are_the_same_objects() -> None:
    @quick
    def fetch(a: Any = ODD, *, b: Any = LIST, c: Any = float("nan")) -> Any:
        return a, b, c

    keep_failures = fetch.__wrapped__
    assert fetch.__defaults__ == keep_failures.__defaults__
    assert fetch.__defaults__[0] is ODD
    assert fetch.__kwdefaults__["b"] is LIST
    assert fetch.__kwdefaults__["c"] is keep_failures.__kwdefaults__["c"]
    assert fetch()[:2] == (ODD, LIST)


def test_a_mutable_default_is_shared_as_it_always_is() -> None:
    @quick
    def remember(x: int, seen: list[int] = []) -> list[int]:  # noqa: B006 - what is tested
        seen.append(x)
        return seen

    remember(1)
    assert remember(2) == [1, 2]


PARAMETERS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "é", "self", "type", "id", "_wrapper", "switch", "Exception"]),
        st.booleans(),
    ),
    max_size=5,
    unique_by=lambda p: p[0],
)


@st.composite
def functions(draw: st.DrawFn) -> str:
    """Write a `def` with parameters of all kinds."""
    groups = [[], [], []]  # type: list[list[str]]
    defaulted = False
    for name, has_default in draw(PARAMETERS):
        kind = draw(st.integers(0, 2))
        groups[kind].append(f"{name}=ODD" if has_default else name)
    for group in groups[:2]:
        for n, text in enumerate(group):
            defaulted = defaulted or "=" in text
            if defaulted and "=" not in text:
                group[n] += "=ODD"
    parts = [*groups[0], *(["/"] if groups[0] else []), *groups[1]]
    star = draw(st.sampled_from(["", "*rest"]))
    if star or groups[2]:
        parts += [star or "*", *groups[2]]
    if draw(st.booleans()):
        parts.append("**more")
    return f"def fetch({', '.join(parts)}): return dict(locals())"


@given(functions(), st.data())
def test_every_call_binds_as_it_does_without_the_decorator(
    source: str, data: st.DataObject
) -> None:
    scope: dict[str, Any] = {"ODD": ODD}
    exec(source, scope)
    fetch = scope["fetch"]
    names = [p for p in inspect.signature(fetch).parameters if p not in ("rest", "more")]
    args = data.draw(st.lists(st.integers(), max_size=4))
    kwargs = data.draw(st.dictionaries(st.sampled_from([*names, "extra"]), st.integers()))

    def outcome(fn: Callable[..., Any]) -> Any:
        try:
            return fn(*args, **kwargs)
        except TypeError as error:
            return str(error)

    wrapped = quick(fetch)
    assert outcome(wrapped) == outcome(fetch)
    expected = outcome(fetch)
    got = outcome(wrapped.call)
    if isinstance(expected, str):
        assert isinstance(got, str)
        assert wrapped.stats.calls == 0, "wrong arguments are no failure of the function"
    else:
        assert got.value == expected


def test_wrong_arguments_fail_at_once_and_name_the_function() -> None:
    @quick
    def fetch(x: int) -> int:
        return x

    with pytest.raises(TypeError, match=r"fetch\(\) missing 1 required positional argument: 'x'"):
        fetch()  # type: ignore[call-arg]
    assert fetch.stats.calls == 0


PARAMETER_NAMES = [
    name
    for name in [*dir(builtins), "_wrapper", "switch", "_opero", "données", "self", "lane"]
    if name.isidentifier() and not keyword.iskeyword(name) and name != "__debug__"
]


def test_a_parameter_may_be_called_like_a_builtin(way: Any) -> None:
    for name in PARAMETER_NAMES:
        scope: dict[str, Any] = {}
        exec(f"def fetch({name}, b=2): return {name}, b", scope)
        fetch = way(scope["fetch"])
        assert (fetch(1), fetch(1), fetch(**{name: 1})) == ((1, 2),) * 3


def test_a_generators_parameter_may_be_called_like_a_builtin() -> None:
    for name in PARAMETER_NAMES:
        scope: dict[str, Any] = {}
        exec(f"def stream({name}): yield {name}", scope)
        assert list(quick(scope["stream"])(1)) == [1]


def test_a_function_with_such_a_parameter_is_retried_from_the_fast_path() -> None:
    made = []

    @quick
    def fetch(Exception: int) -> int:  # noqa: N803 - what is tested
        made.append(Exception)
        if len(made) == 2:
            raise KeyError
        return Exception

    assert (fetch(1), fetch(2)) == (1, 2)
    assert made == [1, 2, 2]


def own_names() -> list[str]:
    """Every name that generated code uses."""
    made = [everything(lambda x: x), quick(lambda x: x), opero(lambda x: x)]

    async def stream(x: int) -> AsyncIterator[int]:
        yield x

    made += [quick(stream), quick(lambda x: (yield x)), opero(cache_backend="disk")(lambda x: x)]
    return sorted(
        {name for fn in made for name in (*fn.__code__.co_names, *fn.__code__.co_varnames)}
        | {name for fn in made for name in fn.__globals__ if name.startswith("_opero")}
    )


def test_a_parameter_may_be_called_like_opero_calls_its_own(way: Any) -> None:
    for name in own_names():
        scope: dict[str, Any] = {}
        exec(f"def fetch({name}, b=2, *, c=3): return {name}, b, c", scope)
        exec(f"async def afetch({name}): return {name}", scope)
        exec(f"def fail({name}): raise ValueError({name})", scope)
        fetch = way(scope["fetch"])
        assert fetch(1) == (1, 2, 3)
        assert fetch(**{name: 1}, c=4) == (1, 2, 4)
        assert asyncio.run(way(scope["afetch"])(1)) == 1
        with pytest.raises(ValueError, match="1"):
            way(scope["fail"])(1)


def test_own_names_are_all_marked() -> None:
    assert {n for n in own_names() if not n.startswith("_opero")} <= {
        "x",
        "__builtins__",
        *("on", "closed", "expires", "visited", "copier", "value", "calls", "prior_outcome", "key"),
        *("flight", "give_up", "find_or_lead", "lead", "land", "drop", "open"),
        *("iterate", "ended", "item", "send", "throw"),
        *("limiter", "threads_waiting", "loops_waiting", "take_slot"),
    }


def test_a_mangled_parameter_works() -> None:
    class Client:
        @quick
        def fetch(self, __x: int, __y: int = 2) -> tuple[int, int]:  # noqa: PYI063 - mangled
            return __x, __y

    assert Client().fetch(1, _Client__y=3) == (1, 3)  # type: ignore[call-arg]


class _opero:  # noqa: N801 - mangled, its parameters begin like opero's own names
    @quick
    def fetch(self, __run: int) -> int:  # noqa: PYI063 - mangled, not positional
        return __run


def test_a_parameter_that_is_mangled_to_an_own_name_works() -> None:
    assert _opero().fetch(5) == 5


def test_sixty_parameters_work(way: Any) -> None:
    names = [f"p{n}" for n in range(60)]
    scope: dict[str, Any] = {}
    exec(f"def fetch({', '.join(names)}): return [{', '.join(names)}]", scope)
    fetch = way(scope["fetch"])
    assert fetch(*range(60)) == fetch(**dict(zip(names, range(60), strict=True)))


def test_a_decorator_below_that_injects_an_argument_still_does(way: Any) -> None:
    def with_client(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def inject(*args: Any, **kwargs: Any) -> Any:
            return fn("client", *args, **kwargs)

        return inject

    @way
    @with_client
    def fetch(client: str, x: int, *, y: int = 0) -> tuple[str, int, int]:
        return client, x, y

    assert fetch(1) == ("client", 1, 0)
    assert fetch(1, y=2) == ("client", 1, 2)
    assert fetch(x=3) == ("client", 3, 0)


def test_a_signature_that_hides_a_parameter_does_not_hide_it_from_callers() -> None:
    def fetch(x: int, _secret: int = 0) -> tuple[int, int]:
        return x, _secret

    fetch.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # inspect reads it
        [inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    )
    wrapped = quick(fetch)
    assert wrapped(1, _secret=2) == (1, 2)
    assert str(inspect.signature(wrapped)) == "(x)"


# --- what it says of itself -----------------------------------------------------------------------


@quick
def documented(x: int, *rest: float, flag: bool = True, **more: str) -> list[int]:
    """Do something.

    >>> documented(2)
    [2]
    """
    return [x]


@quick
async def adocumented(x: int) -> list[int]:
    """Do it later."""
    return [x]


def test_it_is_a_plain_function() -> None:
    assert inspect.isfunction(documented)


def test_names_docs_and_annotations_survive() -> None:
    original = documented.__wrapped__
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(documented, name) == getattr(original, name)


def test_signature_and_hints_survive() -> None:
    assert inspect.signature(documented) == inspect.signature(documented.__wrapped__)
    assert typing.get_type_hints(documented) == {
        "x": int,
        "rest": float,
        "flag": bool,
        "more": str,
        "return": list[int],
    }


def test_attributes_of_the_function_survive() -> None:
    def fetch() -> None: ...

    fetch.tag = "x"  # type: ignore[attr-defined]
    assert quick(fetch).tag == "x"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came with 3.12")
def test_type_parameters_survive() -> None:
    scope: dict[str, Any] = {}
    exec("def fetch[T](x: T) -> T: return x", scope)
    assert quick(scope["fetch"]).__type_params__ == scope["fetch"].__type_params__


def test_getsource_shows_the_users_source() -> None:
    assert "Do something." in inspect.getsource(documented)


def test_doctest_finds_the_examples() -> None:
    found = doctest.DocTestFinder().find(documented, "documented", globs={"documented": documented})
    assert [len(test.examples) for test in found] == [1]


def test_doctest_finds_decorated_functions_of_a_module() -> None:
    module = sys.modules[__name__]
    found = {test.name for test in doctest.DocTestFinder().find(module) if test.examples}
    assert f"{__name__}.documented" in found


@pytest.mark.parametrize(
    ("fn", "coroutine", "generator", "async_generator"),
    [
        (documented, False, False, False),
        (adocumented, True, False, False),
        (quick(lambda: (yield)), False, True, False),
    ],
)
def test_inspect_knows_the_kind(
    fn: Any, coroutine: bool, generator: bool, async_generator: bool
) -> None:
    assert inspect.iscoroutinefunction(fn) is coroutine
    assert inspect.isgeneratorfunction(fn) is generator
    assert inspect.isasyncgenfunction(fn) is async_generator


def test_inspect_knows_an_async_generator() -> None:
    @quick
    async def stream() -> AsyncIterator[int]:
        yield 1

    assert inspect.isasyncgenfunction(stream)
    assert not inspect.iscoroutinefunction(stream)


def test_a_decorated_function_pickles_by_name() -> None:
    assert pickle.loads(pickle.dumps(documented)) is documented


def test_a_copy_is_the_function_itself() -> None:
    assert copy.copy(documented) is documented
    assert copy.deepcopy([documented])[0] is documented


def test_a_function_can_be_referred_to_weakly_and_goes_with_its_last_reference() -> None:
    fetch = quick(lambda: 1)
    assert fetch() == 1
    gone = weakref.ref(fetch)
    del fetch
    gc.collect()
    assert gone() is None


# --- other callables ------------------------------------------------------------------------------


def test_a_partial_keeps_its_arguments_and_the_functions_docs() -> None:
    fetch = quick(functools.partial(documented.__wrapped__, 7, flag=False))
    assert fetch() == [7]
    assert fetch.__name__ == "documented"
    assert fetch.__doc__.startswith("Do something.")
    assert list(inspect.signature(fetch).parameters) == ["rest", "flag", "more"]


def test_a_partial_of_a_decorated_function_works() -> None:
    assert functools.partial(documented, 7)() == [7]
    assert inspect.iscoroutinefunction(functools.partial(adocumented, 7))


class Adder:
    """Adds."""

    call = "an attribute of the user's"
    unit: str = "m"

    def __init__(self, by: int) -> None:
        self.by = by
        self.stats = "another one"

    def __call__(self, x: int, y: int = 0) -> int:
        return x + y + self.by


def test_a_callable_object_works_and_keeps_its_attributes_to_itself() -> None:
    add = quick(Adder(10))
    assert add(1, y=2) == 13
    assert (add.__name__, add.__doc__) == ("Adder", "Adds.")
    assert not hasattr(add, "by")
    assert add.stats.calls == 1
    assert str(inspect.signature(add)) == "(x: 'int', y: 'int' = 0) -> 'int'"


def test_a_callable_object_with_async_call_works() -> None:
    class Fetch:
        async def __call__(self, x: int) -> int:
            return x

    fetch = quick(Fetch())
    assert inspect.iscoroutinefunction(fetch)
    assert asyncio.run(fetch(3)) == 3


def test_a_class_works_as_a_function_that_makes_instances() -> None:
    make = quick(Adder)
    assert inspect.isfunction(make)
    assert make(3).by == 3
    assert make.__doc__ == "Adds."
    assert not {"__dict__", "__init__", "unit", "call "} & set(vars(make))
    assert make.__annotations__ == {}


@pytest.mark.parametrize(
    ("fn", "args", "result"),
    [
        (len, ("abc",), 3),
        (max, (1, 2), 2),
        (dict, (), {}),
        ({1: 2}.get, (1,), 2),
        ({}.pop, (1, 5), 5),
        (str.upper, ("a",), "A"),
        (functools.lru_cache(lambda x: x), (4,), 4),
        (random.Random(1).seed, (2,), None),
    ],
)
def test_a_builtin_works(fn: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
    wrapped = quick(fn)
    assert wrapped(*args) == result
    assert wrapped.call(*args).value == result


def test_keywords_reach_a_builtin_without_signature() -> None:
    assert quick(dict)(a=1) == {"a": 1}


def test_a_lambda_works_and_is_called_so() -> None:
    fetch = quick(lambda x: x + 1)
    assert fetch(1) == 2
    assert fetch.__name__ == "<lambda>"


def test_a_decorated_function_can_be_decorated() -> None:
    outer = quick(documented)
    assert outer(5) == [5]
    assert outer.stats is not documented.stats


# --- .call ----------------------------------------------------------------------------------------


def test_call_has_the_functions_parameters_and_says_whose_it_is() -> None:
    assert list(inspect.signature(documented.call).parameters) == ["x", "rest", "flag", "more"]
    assert documented.call.__qualname__ == "documented.call"
    assert "documented" in documented.call.__doc__


def test_call_gives_a_receipt() -> None:
    assert documented.call(4).value == [4]


def test_call_of_a_coroutine_function_is_awaited() -> None:
    assert asyncio.run(adocumented.call(4)).value == [4]  # type: ignore[arg-type]


# --- tracebacks -----------------------------------------------------------------------------------


@quick
def boom(depth: int) -> None:
    raise ValueError(depth)


def test_a_traceback_shows_the_generated_lines_and_the_functions_name() -> None:
    with pytest.raises(ValueError, match="1") as raised:
        boom(1)
    frames = [f for f in traceback.extract_tb(raised.tb) if f.filename.startswith("<opero ")]
    assert {frame.name for frame in frames} == {"boom"}
    assert all(frame.line for frame in frames)


def test_a_shape_is_compiled_once_and_each_function_keeps_its_name() -> None:
    first, second = quick(lambda a, b: a), quick(lambda a, b: b)
    assert first.__code__.co_filename == second.__code__.co_filename
    assert (first(1, 2), second(1, 2)) == (1, 2)


def test_the_generated_source_stays_readable_after_checkcache() -> None:
    import linecache

    filename = boom.__code__.co_filename
    linecache.checkcache()
    assert "_opero_run" in "".join(linecache.getlines(filename, boom.__globals__))


def test_a_generators_wrapper_is_one_too() -> None:
    @quick
    def stream(n: int) -> Iterator[int]:
        yield from range(n)

    assert list(stream(3)) == [0, 1, 2]
    assert str(inspect.signature(stream)) == "(n: 'int') -> 'Iterator[int]'"


@pytest.mark.parametrize("values", [("a", "b"), ["a", "b"], (), [], (1, None, b"x")])
def test_a_default_of_several_values_has_the_same_key_in_the_fast_path(values: Any) -> None:
    @opero(retries=0, cache_copy=False)
    def ask(prompt: str, model: Any = values) -> object:
        return object()

    first = ask("x")
    assert ask("x") is first
    assert ask("x", type(values)(values)) is first
    assert ask("x", [*values, "c"]) is not first
    assert ask.cache.invalidate("x")
    assert ask("x") is not first


def test_a_default_list_that_was_changed_has_another_key() -> None:
    models = ["a", "b"]

    @opero(retries=0)
    def ask(prompt: str, model: Any = models) -> object:
        return tuple(model)

    assert ask("x") == ("a", "b")
    models.append("c")
    assert ask("x") == ("a", "b", "c")
