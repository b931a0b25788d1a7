# this_file: tests/caching/keys/test_function_keys.py
"""From calls to keys."""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import types
import typing
import weakref

import numpy as np
import pytest
from tests.tables import rows

from opero import opero
from opero.caching.keys import FAST_TYPES, digest
from opero.caching.keys.function_keys import (
    FunctionKeys,
    InstanceTokens,
    code_digest,
    function_id,
    key_names,
    key_source,
    namespace_of,
    namespace_prefix,
)
from opero.core.function import FunctionInfo
from opero.errors import OperoUsageError, StoreError, UnkeyableError
from opero.utils import ambient

pytestmark = pytest.mark.internal


def keying(fn, **options) -> FunctionKeys:
    return FunctionKeys(FunctionInfo(fn), **options)


def key(fn, /, *args, **kwargs):
    return keying(fn).key(args, kwargs)


def plain(x, y=3, *, z=None):
    return x, y, z


def starred(x, *args, **kwargs):
    return x, args, kwargs


def test_a_key_of_scalars_is_types_and_values_in_declared_order():
    assert key(plain, "a") == (str, "a", int, 3, type(None), None)
    assert key(plain, 2.5, y=b"") == (float, 2.5, bytes, b"", type(None), None)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1,), {}), ((), {"x": 1}), ((1, 3), {}), ((1,), {"y": 3}), ((), {"z": None, "y": 3, "x": 1})],
)
def test_ways_to_write_a_call_have_one_key(args, kwargs):
    assert key(plain, *args, **kwargs) == key(plain, 1, 3, z=None)


def test_arguments_that_a_wrapper_has_completed_need_no_binding(monkeypatch):
    made = keying(plain)
    monkeypatch.setattr(inspect.Signature, "bind", None)
    assert made.key((1, 3), {"z": None}) == (int, 1, int, 3, type(None), None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True), (1, 1.0), (1, "1"), (0.0, -0.0), (b"a", "a"), (None, "None"), ((1,), [1]),
        ([1], [True]), ({"a": 1}, {"a": 1.0}), ({1}, frozenset({1})),
    ],
    ids=repr,
)  # fmt: skip
def test_values_of_different_types_have_different_keys(one, other):
    assert key(plain, one) != key(plain, other)


def test_nan_equals_itself():
    assert key(plain, float("nan")) == key(plain, float("nan"))
    assert key(plain, [float("nan")]) == key(plain, [float("nan")])


@pytest.mark.parametrize("size", [1, 2, 16, 17, 100])
@pytest.mark.parametrize("kind", [list, tuple])
def test_short_and_long_sequences_tell_types_and_content(kind, size):
    ones = kind([1] * size)
    assert key(plain, ones) == key(plain, kind([1] * size))
    others = [kind([True] * size), kind([1.0] * size), kind(["1"] * size), kind([1] * (size + 1))]
    others += [(list if kind is tuple else tuple)(ones), kind([1] * (size - 1) + [None])]
    assert len({key(plain, value) for value in (ones, *others)}) == 7


def test_a_list_has_a_key_by_content():
    assert key(plain, [1, {"a": {2}}]) == key(plain, [1, {"a": {2}}])
    assert isinstance(key(plain, [1, {"a": {2}}]), bytes)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_short_list_of_scalars_has_a_key_without_a_digest(kind):
    assert key(plain, kind([1, "a"])) == key(plain, kind([1, "a"]))
    assert [isinstance(key(plain, kind([1] * n)), bytes) for n in (2, 16, 17)] == [
        False,
        False,
        True,
    ]
    assert key(plain, kind([1])) != key(plain, kind([True]))
    assert key(plain, [1]) != key(plain, (1,))


def test_a_key_of_content_is_the_digest_of_names_and_values():
    assert key(plain, [[1]]) == digest((("x", [[1]]), ("y", 3), ("z", None)))


def key_by_text(made, cache):
    """Return the function that a wrapper contains: it makes a key itself, or asks the cache for it."""
    names = ", ".join(p.name for p in made.function.calling)
    text = key_source(made, typed=True).replace("{args}", f"({names},)").replace("{kwargs}", "{}")
    scope = key_names(made) | {kind.__name__: kind for kind in (*FAST_TYPES, type)}
    scope |= {"id": id, "cache": cache}
    scope = {f"_opero_{name}": value for name, value in scope.items()}
    exec(f"def fn({names}):\n{textwrap.indent(text, '    ')}\n    return _opero_key", scope)
    return scope["fn"]


def test_a_wrapper_makes_the_same_keys_itself():
    pair, box, half = (1, "a"), [1, 2], 2.5

    def fn(x, y=pair, z=box, w=half): ...

    made = keying(fn, ignore=("w",))
    itself, asking = key_by_text(made, None), key_by_text(made, made)
    assert itself("a", pair, box, half) == made.key(("a",), {})
    assert (
        itself(True, None, 5, half) == made.key((True, None, 5), {}) != made.key((1, None, 5), {})
    )
    others = [
        (1.5, pair, box),
        ("a", tuple(iter(pair)), [*box]),
        ("a", [*pair], box),
        ("a", pair, 1.5),
    ]
    for values in others:
        assert asking(*values, half) == made.key(values, {})
    box.append(3)
    assert asking("a", pair, box, half) == made.key(("a", pair, [1, 2, 3]), {})


def test_a_wrapper_makes_the_keys_of_known_instances_itself(method):
    made, instances, _ = method
    one = Client()
    assert (
        key_by_text(made, made)(one, "a")
        == made.key((one, "a"), {})
        == (instances.token(one), str, "a")
    )
    assert key_by_text(made, None)(one, "a") == made.key((one, "a"), {})


def test_keyword_arguments_come_in_any_order():
    assert key(starred, 1, 2, a=1, b=2) == key(starred, 1, 2, b=2, a=1)
    assert key(starred, 1, 2, a=1, b=2) != key(starred, 1, 2, a=2, b=1)
    assert key(starred, 1, b=("b", 2)) != key(starred, 1, ("b", 2))


def test_values_do_not_slip_between_parameters():
    assert key(plain, "a", "b") != key(plain, "b", "a")
    assert key(starred, 1, 2) != key(starred, 1, a=2)


@pytest.mark.parametrize("name", ["self", "func", "key", "args", "kwargs", "call", "type", "id"])
def test_any_name_of_a_parameter_works(name):
    scope: dict = {}
    exec(f"def fn({name}, other=1): ...", scope)
    assert key(scope["fn"], **{name: "v"}) == key(scope["fn"], "v", 1)


def test_a_default_that_refuses_comparison_is_no_obstacle():
    def fn(a, weights=np.array([1, 2])):  # noqa: B008 - what numeric code does
        return a

    assert key(fn, 1) == key(fn, 1, np.array([1, 2]))


def test_a_wrapped_function_is_keyed_by_the_parameters_users_see():
    @functools.wraps(plain)
    def wrapper(*args, **kwargs):
        return plain(*args, **kwargs)

    assert key(wrapper, 1) == key(wrapper, x=1, y=3)
    assert keying(wrapper).fast_parameters == ()


def any_arguments(*args, **kwargs): ...
def another_default(x, y=2): ...
def another_name(x, z=1): ...
def keyword_only(x, *, y=1): ...


@rows("wrapper", [any_arguments, another_default, another_name, keyword_only])
def test_a_wrapper_that_is_called_otherwise_than_it_says_builds_no_key(wrapper):
    def fn(x, y=1): ...

    assert keying(fn).fast_parameters == ("x", "y")
    assert keying(functools.update_wrapper(wrapper, fn)).fast_parameters == ()


def test_arguments_that_do_not_fit_have_no_key():
    assert key(plain) is None
    assert key(plain, 1, nonsense=2) is None
    assert keying(plain, user_key=lambda x: x).key((), {}) is None


class Strange(type):
    __hash__ = None  # type: ignore[assignment]


def test_a_class_that_cannot_be_hashed_is_no_obstacle():
    class Odd(metaclass=Strange):
        pass

    with pytest.raises(UnkeyableError, match="'x'"):
        key(plain, Odd())


# --- options --------------------------------------------------------------------------------------


def test_ignored_parameters_are_left_out():
    made = keying(plain, ignore=("y",))
    assert made.key((1, object()), {}) == (int, 1, type(None), None)
    assert made.fast_parameters == ("x", "z")


def test_an_ignored_keyword_of_a_function_that_takes_any_is_left_out():
    made = keying(starred, ignore=("client",))
    assert made.key((1,), {"client": object()}) == made.key((1,), {})


def test_ignoring_a_parameter_that_does_not_exist_is_an_error():
    with pytest.raises(OperoUsageError, match=r"cache_ignore='clint'.*Did you mean 'client'"):
        keying(lambda client: None, ignore=("clint",))


def test_a_key_of_the_users_own_gets_the_calls_arguments():
    made = keying(plain, user_key=lambda x, **rest: (x.lower(), sorted(rest)))
    assert made.key(("A",), {"z": 1}) == made.key(("a",), {"z": 2}) != made.key(("a",), {})
    assert made.fast_parameters == ()


def test_keys_of_the_users_own_differ_by_type():
    made = keying(plain, user_key=lambda x: x)
    assert len({made.key((x,), {}) for x in (1, True, 1.0, "1")}) == 4


def test_a_key_of_the_users_own_without_content_is_an_error():
    ways = r"cache_key returned .* key: object has .*\. Return text, numbers, or a tuple of them\.$"
    with pytest.raises(UnkeyableError, match=ways):
        keying(plain, user_key=lambda x: object()).key((1,), {})


def test_an_error_in_the_users_own_key_is_the_users():
    with pytest.raises(TypeError, match="unsupported operand"):
        keying(plain, user_key=lambda x: x + "1").key((1,), {})


# --- unkeyable ------------------------------------------------------------------------------------


def test_an_unkeyable_argument_is_named_with_the_ways_out():
    with pytest.raises(UnkeyableError) as caught:
        key(plain, 1, {"cfg": [1, threading.Lock()]})
    text = str(caught.value)
    assert (
        "plain(): the argument 'y' cannot be part of a cache key: y.cfg[1] is _thread.lock" in text
    )
    assert text.endswith(
        ". Leave it out with cache_ignore=('y',), build the key yourself with cache_key=…, "
        "or switch the cache off with cache=False."
    )
    assert caught.value.__suppress_context__


def test_an_unkeyable_argument_itself_is_named():
    with pytest.raises(UnkeyableError, match=r"argument 'x' cannot .* key: function, which cannot"):
        key(plain, lambda: None)


# --- methods --------------------------------------------------------------------------------------


class Client:
    def fetch(self, x):
        return x

    def __eq__(self, other):
        raise AssertionError("an instance must not be compared")

    def __hash__(self):
        raise AssertionError("an instance must not be hashed")


@dataclasses.dataclass(frozen=True)
class Fixed:
    name: str

    def fetch(self, x):
        return x


class Colour(enum.Enum):
    RED = 1
    BLUE = 2

    def fetch(self, x):
        return x


class Pair(typing.NamedTuple):
    a: int
    b: int

    def fetch(self, x):
        return x


class Slotted:
    __slots__ = ("a",)

    def fetch(self, x):
        return x


@pytest.fixture
def method():
    gone: list[int] = []
    instances = InstanceTokens(forget=gone.append)
    made = keying(Client.fetch, instances=instances)
    return made, instances, gone


def test_instances_without_content_differ_by_identity(method):
    made, instances, _ = method
    one, two = Client(), Client()
    first = made.key((one, "a"), {})
    assert first == (instances.tokens[id(one)], str, "a")
    assert first == made.key((one, "a"), {})
    assert first != made.key((two, "a"), {})
    assert made.instances is instances


def test_other_arguments_of_a_method_are_keyed_by_content(method):
    made, instances, _ = method
    one = Client()
    found = made.key((one, [[1]]), {})
    assert found[0] == instances.tokens[id(one)]
    assert isinstance(found[1], bytes)
    assert found == made.key((one,), {"x": [[1]]})


def test_a_dead_instance_is_forgotten_without_the_garbage_collector(method):
    made, instances, gone = method
    gc.disable()
    try:
        one = Client()
        made.key((one, 1), {})
        token, watch = instances.tokens[id(one)], weakref.ref(one)
        del one
        assert watch() is None
        assert gone == [token]
        assert not instances.tokens
        assert not instances.references
    finally:
        gc.enable()


def test_an_id_that_is_used_again_gets_a_new_token(method):
    made, _, _ = method
    seen = set()
    for _ in range(50):
        seen.add(made.key((Client(), 1), {}))
    assert len(seen) == 50


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (Fixed("a"), Fixed("a"), Fixed("b")),
        (Colour.RED, Colour.RED, Colour.BLUE),
        (Pair(1, 2), Pair(1, 2), Pair(2, 1)),
        (5, 5, 6),
    ],
    ids=["frozen dataclass", "enum", "named tuple", "static method"],
)
def test_instances_with_content_share(method, one, same, other):
    made, instances, _ = method
    assert made.key((one, 1), {}) == made.key((same, 1), {})
    assert made.key((one, 1), {}) != made.key((other, 1), {})
    assert not instances.tokens


def test_classes_differ(method):
    made, instances, _ = method

    class Sub(Client):
        pass

    assert made.key((Client, 1), {}) != made.key((Sub, 1), {})
    assert len(instances.tokens) == 2


def test_an_instance_with_neither_content_nor_weak_references_is_unkeyable(method):
    with pytest.raises(UnkeyableError, match=r"'self' .*Slotted has neither"):
        method[0].key((Slotted(), 1), {})


def test_ignoring_the_instance_makes_all_instances_share():
    made = keying(Client.fetch, ignore=("self",), instances=InstanceTokens(forget=print))
    assert made.instances is None
    assert made.key((Client(), 1), {}) == made.key((Client(), 1), {}) == (int, 1)


def test_tokens_are_handed_out_once_under_threads():
    instances = InstanceTokens(forget=print)
    objects = [Client() for _ in range(50)]
    found: list[list[int]] = []

    def work() -> None:
        found.append([instances.token(o) for o in objects])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(tokens == found[0] for tokens in found)
    assert len(set(found[0])) == 50


def test_a_dropped_registry_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        one, instances = Client(), InstanceTokens(forget=print)
        instances.token(one)
        watch = weakref.ref(instances)
        del instances
        assert watch() is None
    finally:
        gc.enable()


# --- stores that functions share ------------------------------------------------------------------


def named(fn, version=None) -> str:
    return function_id(FunctionInfo(fn), version)


def test_a_function_is_called_by_module_and_name():
    assert named(plain) == f"{__name__}:plain"
    assert named(plain, "2") == f"{__name__}:plain@2"
    assert named(factory(1)).startswith(f"{__name__}:factory.<locals>.inner#")
    assert named(lambda: 1).startswith(f"{__name__}:test_a_function_is_called_by_module_and_name.")


def factory(n):
    def inner(x):
        return x + n

    return inner


def test_closures_differ_by_what_they_close_over():
    assert named(factory(1)) == named(factory(1)) != named(factory(2))


def test_a_closure_bound_to_a_value_differs_by_both():
    names = [named(types.MethodType(factory(n), held)) for n in (1, 2) for held in (1, 2)]
    assert len(set(names)) == 4
    assert names[0] == named(types.MethodType(factory(1), 1))


def test_lambdas_differ_by_what_they_do():
    one, other = (lambda x: x + 1), (lambda x: x * 100)
    assert named(one) != named(other)
    assert named(factory(1)) != named(lambda x: x)


def test_two_lambdas_do_not_share_a_folder(tmp_path):
    decorate = opero(cache_backend=f"disk:{tmp_path / 'cache'}")
    add, multiply = decorate(lambda x: x + 1), decorate(lambda x: x * 100)
    assert (add(5), multiply(5)) == (6, 500)


def test_partials_differ_by_what_they_bind():
    one, two = functools.partial(plain, 1), functools.partial(plain, 2)
    assert named(one) == named(functools.partial(plain, 1)) != named(two)
    assert named(one) != named(plain)
    closures = [named(functools.partial(factory(n), 1)) for n in (1, 1, 2)]
    assert closures[0] == closures[1] != closures[2]


def test_a_recursive_inner_function_has_a_name():
    def down(n):
        return down(n - 1) if n else 0

    assert named(down).endswith("down")


def test_a_function_bound_to_something_without_content_is_unkeyable():
    with pytest.raises(UnkeyableError, match=r"functions share.*\(n\.1: _thread\.lock has no"):
        named(factory([1, threading.Lock()]))


def test_a_callable_object_and_a_bound_method_are_what_they_hold():
    @dataclasses.dataclass(frozen=True)
    class Adder:
        n: int

        def __call__(self, x):
            return x + self.n

    assert named(Adder(1)) == named(Adder(1)) != named(Adder(2))
    assert named(Fixed("a").fetch) == named(Fixed("a").fetch) != named(Fixed("b").fetch)
    assert named(len).endswith(":len")


def test_a_key_in_a_shared_store_is_text():
    made = keying(plain, prefix=lambda: "space:plain:")
    found = made.key((1,), {})
    assert found.startswith("space:plain:")
    assert len(found) == len("space:plain:") + 40
    assert made.fast_parameters == ()
    own = keying(plain, prefix=lambda: "p:", user_key=lambda x: x)
    assert own.key((1,), {}).startswith("p:")
    assert own.key((1,), {}) != own.key((2,), {})


def test_text_keys_are_the_same_in_every_process():
    code = (
        "from opero.caching.keys.function_keys import FunctionKeys; from opero.core.function import FunctionInfo\n"
        "def f(x, **k): ...\n"
        "key = FunctionKeys(FunctionInfo(f), prefix=str).key\n"
        "print(key(({'a', 'b', 'c'},), {'p': 1, 'q': 2}))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(runs) == 1


def test_a_notebook_is_what_jupyter_calls_it(monkeypatch, tmp_path):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "rates.ipynb"))
    assert ambient.main_script() == os.path.realpath(tmp_path / "rates.ipynb")


@pytest.mark.parametrize("module", ["__main__", "__mp_main__"])
def test_a_function_of_a_script_is_called_by_its_file(monkeypatch, module):
    def fn(): ...

    fn.__module__ = module
    monkeypatch.setattr(ambient, "main_script", lambda: "/a:b/job.py")
    assert named(fn).startswith("/a%3Ab/job.py:")
    monkeypatch.setattr(ambient, "main_script", lambda: None)
    assert named(fn).startswith(f"{module}:")


@pytest.mark.parametrize("namespace", ["geo", "geo:eu", "100%", "~"])
def test_a_key_tells_its_namespace(namespace):
    assert namespace_of(f"{namespace_prefix(namespace)}module:locate:0f3a") == namespace


def test_bytes_of_a_path_that_are_no_text_can_be_part_of_a_key():
    assert namespace_prefix("job\udcff") == "job\\udcff:"


def test_function_that_closes_over_a_module_has_a_name_in_shared_stores():
    def made(module):
        def f(x):
            return module, x

        return function_id(FunctionInfo(f))

    assert made(sys) == made(sys) != made(subprocess)
    with pytest.raises(UnkeyableError, match="bound to something without content"):
        made(types.ModuleType("nowhere"))


# --- code -----------------------------------------------------------------------------------------


def test_options_and_place_are_no_part_of_the_code():
    def plain() -> types.ModuleType:
        return {}  # type: ignore[return-value]

    @functools.lru_cache(maxsize=3)
    def one(x: int) -> int:
        return x + 1

    @functools.lru_cache(
        maxsize=4,
    )
    @functools.lru_cache
    def other(x: int) -> int:
        return x + 1

    digests = [code_digest(fn.__wrapped__) for fn in (one, other.__wrapped__)]
    assert digests[0] != digests[1], "the name is"
    assert [code_digest(fn) for fn in (one, other)] == digests
    assert code_digest(functools.partial(plain)) == code_digest(plain)


class Callable:
    def __call__(self, x: int) -> int:
        return x


def test_what_is_not_written_in_python_is_never_edited():
    assert code_digest(len) is None
    assert code_digest(Callable()) is not None
    assert code_digest(eval("lambda x: x")) == code_digest(lambda x: x)


class BrokenBackend:
    def get(self, key):
        raise StoreError


@rows(
    ("made", "backend"),
    [
        (keying(plain), None),
        (keying(len, prefix=lambda: "p:"), None),
        (keying(plain, prefix=lambda: "p:"), BrokenBackend()),
    ],
)
def test_a_function_whose_code_cannot_be_compared_counts_as_not_edited(made, backend):
    assert made.edit_detector(types.SimpleNamespace(backend=backend))() is False


def test_what_a_function_holds_is_part_of_its_code():
    digests = [code_digest(f) for f in (lambda: lambda: 1, lambda: lambda: 2)]
    assert None not in digests
    assert digests[0] != digests[1]


def test_a_function_that_says_it_wraps_itself_has_a_digest():
    def f(x):
        return x

    plain = code_digest(f)
    vars(f)["__wrapped__"] = f
    assert code_digest(f) == plain


def test_code_that_holds_what_no_source_can_has_no_digest():
    def f(x):
        return x

    f.__code__ = f.__code__.replace(co_consts=(*f.__code__.co_consts, object()))
    assert code_digest(f) is None
