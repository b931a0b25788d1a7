# this_file: tests/test_repository.py
"""What the repository promises about itself: headers, README, extras, the wheel."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.marks import internal_imports, is_marked

pytestmark = pytest.mark.internal

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "src" / "opero").rglob("*.py")
    if path.name != "_version.py"
)
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
DEVELOPERS = {"test", "dev"}


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def table(text: str, first_column: str) -> list[list[str]]:
    """Return the cells of the first Markdown table whose first column has that heading."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            if rows:
                break
            continue
        # A bar inside code is written `\|` in Markdown tables.
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if rows or cells[0].lower() == first_column:
            rows.append(cells)
    return rows[2:]


def means(text: str, default: Any) -> bool:
    """Tell whether a cell of the README, such as "`3600`" or "`Exception`", is that default."""
    text = text.strip("`")
    if isinstance(default, type):
        return text == default.__name__
    try:
        value = ast.literal_eval(text.replace(",", "_") if isinstance(default, int) else text)
    except (SyntaxError, ValueError):
        return False
    return type(value) is type(default) and value == default


# --- files ----------------------------------------------------------------------------------------


def test_every_required_file_is_there(cleanup: ModuleType) -> None:
    assert [name for name in cleanup.REQUIRED if not (ROOT / name).is_file()] == []


def test_every_file_says_where_it_is(cleanup: ModuleType) -> None:
    assert [path for path in cleanup.sources() if cleanup.says_where(path) is False] == []


def test_every_module_has_a_docstring() -> None:
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in MODULES}
    assert [path for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_module_is_longer_than_650_lines() -> None:
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in MODULES}
    assert [path for path, text in texts.items() if len(text.splitlines()) > 650] == []


@pytest.mark.parametrize(
    ("call", "home"),
    [
        ("register_at_fork(", "utils/fork.py"),
        ("sqlite3.connect(", "utils/sqlite.py"),
        ("fcntl.lockf(", "limits/state_file.py"),
        ("boot_id", None),
        ("f_lineno", None),
        ("co_firstlineno", None),
    ],
)
def test_a_mechanism_stands_in_one_module(call: str, home: str | None) -> None:
    found = [path for path in MODULES if call in (ROOT / path).read_text(encoding="utf-8")]
    assert found == ([] if home is None else [f"src/opero/{home}"])


@pytest.mark.parametrize("path", ["cleanup.py", ".ci/run"])
@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no executable bit")
def test_a_command_can_be_executed(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)


def paths_named(page: str) -> list[str]:
    """Return the files and folders that a page names in code style, such as `core/retry.py`."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", text) + re.findall(r"\]\(([^)#:]+)\)", text)
    return [span for span in spans if re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.(py|md|toml))", span)]


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_path_that_a_page_names_exists(page: str) -> None:
    named = paths_named((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    places = (ROOT, ROOT / "src" / "opero")
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


def test_every_module_in_a_drawn_way_exists() -> None:
    """The drawings of ARCHITECTURE.md name modules without their ending; each names a file of the package."""
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawings = [
        d for d in re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if "→" in d
    ]
    steps = {s.strip() for d in drawings for s in re.split(r"[→⇢\n]|\(miss\)", d)} - {
        "",
        "function",
    }
    there = {path.removeprefix("src/opero/").removesuffix(".py") for path in MODULES}
    folders = {str(Path(path).parent) for path in there}
    known = there | folders
    assert [s for s in sorted(steps) if not any(f"/{k}".endswith(f"/{s}") for k in known)] == []


# --- README ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["python cleanup.py demo", "python cleanup.py test"])
def test_readme_names_the_command(readme: str, command: str) -> None:
    assert command in readme


def test_readme_lists_every_option_in_order_with_its_default(readme: str) -> None:
    from opero.core.options import Options

    rows = table(readme, "option")
    assert [row[0].strip("`") for row in rows] == list(Options.declared)
    assert [
        f"{name}: {row[1]} stands for {option.default!r}"
        for (name, option), row in zip(Options.declared.items(), rows, strict=True)
        if not means(row[1], option.default)
    ] == []


def test_readme_lists_every_map_option_in_order_with_its_default(readme: str) -> None:
    from opero.core.options import MapOptions, Options

    names = [name for name in MapOptions.declared if name not in Options.declared]
    rows = table(readme, "map option")
    assert [row[0].strip("`") for row in rows] == names
    defaults = [MapOptions.declared[name].default for name in names]
    assert all(means(row[1], default) for default, row in zip(defaults, rows, strict=True))


def test_readme_names_every_extra_and_no_other(readme: str, project: dict[str, Any]) -> None:
    named = {
        extra.strip()
        for extras in re.findall(r"\bopero\[([\w\s,-]+)\]", readme)
        for extra in extras.split(",")
    }
    there = set(project["project"]["optional-dependencies"])
    assert named - there == set()
    assert there - DEVELOPERS - named == set()


@pytest.mark.parametrize(
    ("cell", "default", "same"),
    [
        ("`3600`", 3600, True),
        ("10,000", 10_000, True),
        ("`True`", True, True),
        ("`1`", True, False),
        ("`30`", 0.1, False),
        ('`"memory"`', "memory", True),
        ("`memory`", "memory", False),
        ("`Exception`", Exception, True),
        ("`()`", (), True),
        ("`None`", None, True),
        ("", None, False),
    ],
)
def test_a_cell_means_a_default(cell: str, default: Any, same: bool) -> None:
    assert means(cell, default) is same


# --- packaging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DEVELOPERS))
def test_developer_extra_repeats_its_group(
    name: str, project: dict[str, Any], cleanup: ModuleType
) -> None:
    extras = project["project"]["optional-dependencies"]
    repeated = set(extras[name])
    if "opero[test]" in repeated:
        repeated = (repeated - {"opero[test]"}) | set(extras["test"])
    assert repeated == set(cleanup.group_members(project, name))


def test_each_extra_is_used_by_code(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    code = "\n".join((ROOT / path).read_text("utf-8") for path in MODULES)
    for name, needs in extras.items():
        if name not in DEVELOPERS | {"all"}:
            for need in needs:
                module = re.split(r"[\[><=]", need)[0].replace("-", "_").removesuffix("_api")
                assert module in code, f"{name} brings {need}"


def test_extra_all_brings_every_other_extra(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    brought = set(re.fullmatch(r"opero\[(.+)\]", everything)[1].split(","))  # type: ignore[index]
    assert brought == {name for name, needs in extras.items() if needs} - DEVELOPERS - {"all"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy without git, built without the network."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "_version.py")
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SETUPTOOLS_SCM", "VCS_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import hatchling.build as b; print(b.build_wheel('dist'))"],
        cwd=copy,
        env={**clean, "GIT_CEILING_DIRECTORIES": str(copy.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(copy / "dist" / done.stdout.split()[-1])


def test_wheel_of_a_copy_without_git_has_the_fallback_version(
    wheel: zipfile.ZipFile, project: dict[str, Any]
) -> None:
    fallback = project["tool"]["hatch"]["version"]["fallback-version"]
    # The index has an older program as 2.7.5: `pip install -U` must not replace this one by it.
    assert int(fallback.split(".")[0]) >= 3
    assert Path(str(wheel.filename)).name == f"opero-{fallback}-py3-none-any.whl"
    written = wheel.read("opero/_version.py").decode()
    assert f'__version__ = "{fallback}"' in written
    assert written.startswith("# this_file: src/opero/_version.py\n")


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.removeprefix("src/") for path in MODULES}
    assert names == modules | {"opero/py.typed", "opero/_version.py"}


def test_a_test_file_is_marked_internal_if_it_imports_internal_names() -> None:
    wrong = []
    for path in TESTS:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        found = internal_imports(tree)
        if is_marked(tree) != bool(found):
            wrong.append(
                f"write `pytestmark = pytest.mark.internal` into {path} because of {found}"
                if found
                else f"remove the mark `internal` from {path}: it uses documented names only"
            )
    assert wrong == []
