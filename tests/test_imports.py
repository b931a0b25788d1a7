# this_file: tests/test_imports.py
"""What importing opero costs, and what can be imported from where."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.marks import PUBLIC

import opero
import opero.core
import opero.decorators
import opero.utils
from opero.utils.lazy import export_lazily

pytestmark = pytest.mark.internal

SRC = Path(opero.__file__).resolve().parent.parent

FORBIDDEN = {
    # dependencies and extras
    *("aiohttp", "asynciolimiter", "attrs", "dask", "httpx", "klepto", "loguru", "multiprocess"),
    *("numpy", "opentelemetry", "pandas", "pathos", "platformdirs", "prometheus_client", "psycopg"),
    *("pydantic", "ray", "redis", "rich", "tenacity", "tqdm", "twat_cache", "twat_mp"),
    # what is heavy in the standard library, or belongs to what comes after a failure
    *("asyncio", "concurrent.futures", "ctypes", "difflib", "email", "hashlib", "http", "json"),
    *("logging", "mmap", "multiprocessing", "pathlib", "pickle", "queue", "random", "shutil"),
    *("socket", "sqlite3", "ssl", "subprocess", "tempfile", "traceback", "unittest", "urllib"),
    *("uuid", "zlib"),
    # of opero: thirty dataclasses, made when the first event is sent
    "opero.events.types",
}

STEPS = {
    "import": "import opero",
    "names": "from opero import opero, RateLimiter, event_bus, failures, clear_cache, Receipt",
    "decorate": """
from opero import opero
@opero
def double(x): return 2 * x
@opero(cache=False, retries=2, arg_fallback='x', secret=['x'], min_delay='10ms')
def other(x): return x
@opero
async def adouble(x): return 2 * x
class Client:
    @opero
    def fetch(self): return 1
""",
    "call": """
from opero import opero
@opero
def double(x): return 2 * x
assert (double(2), double(2), double('a')) == (4, 4, 'aa')
@opero(cache=False, arg_fallback='x')
def other(x): return x
assert other([1, 2]) == 1
class Client:
    @opero
    def fetch(self, x): return [x]
assert Client().fetch(1) == [1]
""",
    "rate limit": """
from opero import opero
@opero(rate_limit='1000/s')
def double(x): return 2 * x
assert (double(2), double(3)) == (4, 6)
""",
    "receipt": """
from opero import opero
@opero
def double(x): return 2 * x
assert double.call(2).value == 4
str(double.explain()), repr(double.stats), repr(double.cache)
""",
}


def run(code: str) -> Any:
    """Run code in a bare interpreter that has opero and nothing else; return what it prints."""
    reported = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(SRC)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert reported.returncode == 0, reported.stderr
    assert reported.stderr == ""
    return json.loads(reported.stdout)


@pytest.mark.parametrize("step", STEPS)
def test_nothing_heavy_is_loaded_up_to_the_first_synchronous_call(step: str) -> None:
    loaded = run(
        f"{STEPS[step]}\nloaded = list(sys.modules)\nimport json\nprint(json.dumps(loaded))"
    )
    assert FORBIDDEN & set(loaded) == set()


def test_importing_the_package_loads_next_to_nothing_of_it() -> None:
    loaded = run("import opero\nloaded = list(sys.modules)\nimport json\nprint(json.dumps(loaded))")
    assert {name for name in loaded if name.startswith("opero")} == {
        "opero",
        "opero.utils",
        "opero.utils.lazy",
    }


def test_every_public_name_can_be_imported_first() -> None:
    code = """
for name in NAMES:
    for module in [m for m in sys.modules if m.partition('.')[0] == 'opero']:
        del sys.modules[module]
    exec(f"from opero import {name}")
print('true')
"""
    assert run(f"NAMES = {opero.__all__!r}\n{code}")


def test_the_order_of_imports_does_not_matter() -> None:
    code = (
        "import opero.core, opero.decorators.opero, opero.utils\n"
        "from opero import opero as first\n"
        "import opero\n"
        "from opero.decorators import opero as second\n"
        "print('true' if first is second is opero.opero else 'false')"
    )
    assert run(code)


# --- public names ---------------------------------------------------------------------------------

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(opero.__path__, "opero.")
    if not module.name.endswith(("__main__", "_version"))
)


@pytest.fixture(scope="module")
def listed() -> dict[str, list[str]]:
    """The `__all__` of each module that has one."""
    modules = {name: importlib.import_module(name) for name in MODULES}
    return {name: list(m.__all__) for name, m in modules.items() if hasattr(m, "__all__")}


def test_only_modules_that_users_import_from_have_all(listed: dict[str, list[str]]) -> None:
    packages = {name for name in listed if hasattr(sys.modules[name], "__path__")}
    assert {*listed} - packages - {*PUBLIC} <= {"opero.events.types"}


def test_all_names_nothing_that_is_not_there(listed: dict[str, list[str]]) -> None:
    named = [(module, name) for module, names in listed.items() for name in names]
    assert [each for each in named if not hasattr(sys.modules[each[0]], each[1])] == []


def test_all_lists_constants_then_classes_then_functions(listed: dict[str, list[str]]) -> None:
    right = {
        module: sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
        for module, names in listed.items()
    }
    assert listed == right


@pytest.mark.parametrize("name", ["opero.errors", "opero.events", "opero.testing"])
def test_all_of_a_public_module_is_complete(name: str) -> None:
    module = importlib.import_module(name)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and getattr(value, "__module__", None) == name
        and (inspect.isclass(value) or inspect.isfunction(value))
    }
    # What only opero's own modules use.
    inner = {"asks", "did_you_mean", "is_final", "matches", "Rejected", "warn_user"}
    assert own - (inner if name == "opero.errors" else set()) <= set(module.__all__)


@pytest.mark.parametrize("package", [opero, opero.core, opero.utils, opero.decorators])
def test_dir_and_all_of_a_package_agree(package: ModuleType) -> None:
    assert set(package.__all__) <= set(dir(package))
    assert package.__all__ == sorted(package.__all__)


@pytest.mark.parametrize("package", [opero, opero.core, opero.utils])
def test_an_unknown_name_is_an_attribute_error(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'x'"):
        package.x  # noqa: B018 - what is tested


def test_the_version_is_text_or_missing() -> None:
    assert isinstance(getattr(opero, "__version__", ""), str)


def test_a_lazy_name_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("lazy_package")
    monkeypatch.setitem(sys.modules, "lazy_package", package)
    get = export_lazily("lazy_package", {"math": ["sqrt"]})
    assert package.__all__ == ["sqrt"]
    assert dir(package) == sorted([*vars(package), "sqrt"])
    assert get("sqrt") is vars(package)["sqrt"]
    with pytest.raises(AttributeError, match="lazy_package"):
        get("cube")


def test_the_package_is_typed() -> None:
    assert (SRC / "opero" / "py.typed").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("opmap", "from opero import operomap"),
        ("AllFailedError", r"opero.failures\(error\)"),
        ("get_cache_decorator", "from opero.core import get_cache_decorator"),
        ("configure_logging", "from opero.utils import configure_logging"),
        ("get_parallel_executor", "from opero.concurrency import get_parallel_executor"),
    ],
)
def test_a_name_of_a_former_version_says_what_to_write(name: str, hint: str) -> None:
    with pytest.raises(ImportError, match=hint):
        exec(f"from opero import {name}")
    assert name not in dir(opero)
