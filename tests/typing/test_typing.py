# this_file: tests/typing/test_typing.py
"""The files beside this one mean to both type checkers what their docstrings say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RIGHT, WRONG = HERE / "right_use.py", HERE / "wrong_use.py"

FRONT_DOOR = re.compile(
    r"opero\.(\w+|(errors|events|testing|utils|decorators)(\..+)?"
    r"|core\.(\w+|(alone|cache\.handle|call|options|protocols|stats)(\..+)?))"
)
"""What users see of the types: the public modules, and what their signatures lead to."""

pytestmark = [pytest.mark.typing, pytest.mark.timeout(300)]


def run(checker: str, *arguments: str) -> str:
    """Run a type checker in this interpreter and return what it prints."""
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    reported = subprocess.run(
        [sys.executable, "-m", checker, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert reported.stdout, reported.stderr
    return reported.stdout


@pytest.fixture(scope="session")
def mypy() -> set[tuple[str, int]]:
    """File names and lines of which mypy complains."""
    reported = run("mypy", "--no-pretty", "--hide-error-context", str(HERE))
    found = re.findall(r"^(.+?\.py):(\d+): error: ", reported, re.MULTILINE)
    return {(Path(file).name, int(line)) for file, line in found if "typing" in file}


@pytest.fixture(scope="session")
def pyright() -> set[tuple[str, int]]:
    """File names and lines of which pyright complains."""
    reported = json.loads(run("pyright", "--outputjson", str(RIGHT), str(WRONG)))
    return {
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1)
        for found in reported["generalDiagnostics"]
    }


@pytest.mark.parametrize("file", [RIGHT, WRONG], ids=lambda path: path.stem)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_no_line_means_anything_else(
    checker: str, file: Path, request: pytest.FixtureRequest
) -> None:
    # In the file of wrong uses each error is expected by a comment; a comment too many is an error.
    found: set[tuple[str, int]] = request.getfixturevalue(checker)
    assert sorted(line for name, line in found if name == file.name) == []


def test_every_wrong_use_is_expected_of_both_checkers() -> None:
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    ignoring = [line for line in lines if "ignore[" in line]
    assert len(ignoring) > 30
    assert [ln for ln in ignoring if not ("type: ignore[" in ln and "pyright: ignore[" in ln)] == []


@pytest.fixture(scope="session")
def symbols() -> list[dict[str, Any]]:
    """What pyright knows of all symbols of the package."""
    # Outside the repository's own configuration: the package is looked at as an installed one.
    reported = json.loads(
        run("pyright", "--verifytypes", "opero", "--ignoreexternal", "--outputjson")
    )
    found: list[dict[str, Any]] = reported["typeCompleteness"]["symbols"]
    return found


def test_the_type_of_each_symbol_is_known(symbols: list[dict[str, Any]]) -> None:
    assert len(symbols) > 2000
    vague = [s["name"] for s in symbols if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    assert vague == []


def test_the_types_of_the_front_door_are_complete(symbols: list[dict[str, Any]]) -> None:
    seen = [s for s in symbols if s["isExported"] and FRONT_DOOR.fullmatch(s["name"])]
    assert len(seen) > 200
    vague = [s["name"] for s in seen if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    assert vague == []
