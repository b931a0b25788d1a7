# this_file: tests/concurrency/test_shipping.py
"""How functions travel: into a fresh interpreter, which knows no module of the tests."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opero.concurrency.executors.pickling import can_import, dumps, dumps_by_value

pytestmark = pytest.mark.internal

MODULE = """
import functools, threading
from opero import RateLimiter, opero

lock = threading.Lock()          # bringing the module along by value stumbles over this
limiter = RateLimiter("7/hour")

def plain(x):
    return x, lock.locked()

@opero(cache=False)
def decorated(x):
    with lock:
        return x + 1

def also(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper

@opero(cache=False)
@also
def twice(x):
    with lock:
        return 2 * x

class Client:
    @opero(cache=False)
    def call(self, x):
        with lock:
            return 3 * x
"""

OPEN = "import pickle, sys; sys.path[:] = {paths!r}; f = pickle.load(sys.stdin.buffer); {code}"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "shipped_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("shipped_module")
    del sys.modules["shipped_module"]


def elsewhere(value: Any, code: str) -> str:
    """Open what was pickled in a fresh interpreter and run some code with it."""
    source = OPEN.format(paths=sys.path, code=code)
    ran = subprocess.run(
        [sys.executable, "-c", source],
        input=dumps_by_value(value),
        capture_output=True,
        check=False,
    )
    assert not ran.returncode, ran.stderr.decode()
    return ran.stdout.decode().strip()


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        (lambda m: m.plain, "(5, False)"),
        (lambda m: m.decorated, "6"),
        (lambda m: m.decorated.__opero__.info.fn, "6"),
        (lambda m: m.twice.__opero__.info.fn, "10"),
        (lambda m: m.twice.__opero__.info.fn.__wrapped__, "10"),
        (lambda m: m.Client().call, "15"),
    ],
)
def test_what_can_be_imported_travels_by_name(module: Any, inside: Any, said: str) -> None:
    function = inside(module)
    assert len(dumps_by_value(function)) < 200
    assert elsewhere(function, "print(f(5))") == said


def test_a_method_inside_a_decorated_one_travels_by_name(module: Any) -> None:
    function = vars(module.Client)["call"].func.__opero__.info.fn
    assert elsewhere(function, "print(f(None, 5))") == "15"


def test_a_decorated_closure_travels_with_its_options() -> None:
    from opero import opero

    calls: list[int] = []

    @opero(cache=False, retries=2, min_delay=0)
    def fails(n: int) -> int:
        calls.append(n)
        raise ValueError(len(calls))

    code = """
try:
    f(1)
except ValueError as error:
    print(error, f.__name__)
"""
    assert elsewhere(fails, f"exec({code!r})") == "3 fails"


def test_a_module_that_no_other_process_can_import_travels_by_value(tmp_path: Path) -> None:
    file = tmp_path / "only_here.py"
    file.write_text("base = 10\nclass Point:\n    pass\ndef add(x):\n    return base + x\n")
    spec = importlib.util.spec_from_file_location("only_here", file)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["only_here"] = loaded
    try:
        spec.loader.exec_module(loaded)
        assert not can_import("only_here")
        assert elsewhere(loaded.add, "print(f(5))") == "15"
        # From now on its instances go by value too.
        point = dumps(loaded.Point())
        source = OPEN.format(paths=sys.path, code="print(type(f).__name__)")
        ran = subprocess.run(
            [sys.executable, "-c", source], input=point, capture_output=True, check=True
        )
        assert ran.stdout.strip() == b"Point"
    finally:
        del sys.modules["only_here"]


@pytest.mark.parametrize("name", ["os", "sys", "json.decoder", "opero.core.call", None, "no.such"])
def test_what_can_be_found_can_be_imported(name: str | None) -> None:
    assert can_import(name)


def test_functions_of_a_module_made_by_hand_travel() -> None:
    made = types.ModuleType("made_by_hand")
    exec("def f(x): return x + 1", vars(made))
    assert elsewhere(made.f, "print(f(5))") == "6"


def test_plain_values_are_pickled_plainly() -> None:
    assert dumps([1, "a"]) == pickle.dumps([1, "a"], 5)


# --- limiters -------------------------------------------------------------------------------------


def test_a_limiter_that_an_import_makes_again_is_the_same_one(module: Any) -> None:
    from opero.limits.shared import share_all

    table = share_all()
    for _ in range(3):
        module.limiter.acquire()
    code = f"""
from opero.limits.shared import attach_table
attach_table({table!r}, "another one")
import shipped_module
print([shipped_module.limiter.try_acquire() for _ in range(6)])
"""
    source = OPEN.format(paths=sys.path, code=f"exec({code!r})")
    ran = subprocess.run(
        [sys.executable, "-c", source], input=pickle.dumps(0), capture_output=True, check=False
    )
    assert ran.stdout.decode().strip() == str([True] * 4 + [False] * 2), ran.stderr.decode()
