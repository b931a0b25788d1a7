# this_file: tests/typing/test_typing.py
"""The type of everything is known. `cleanup.py lint` runs both type checkers over the files beside this one."""

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
WRONG = HERE / "wrong_use.py"

FRONT_DOOR = re.compile(
    r"opero\.(\w+|(errors|events|testing|utils|decorators)(\..+)?"
    r"|core\.(\w+|(alone|cache\.handle|call|options|protocols|stats)(\..+)?))"
)
"""What users see of the types: the public modules, and what their signatures lead to."""

pytestmark = [pytest.mark.typing, pytest.mark.timeout(300)]


def pyright(*arguments: str) -> str:
    """Run pyright in this interpreter and return what it prints."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    reported = subprocess.run(
        [sys.executable, "-m", "pyright", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert reported.stdout, reported.stderr
    return reported.stdout


def test_every_wrong_use_is_expected_of_both_checkers() -> None:
    lines = WRONG.read_text(encoding="utf-8").splitlines()
    ignoring = [line for line in lines if "ignore[" in line]
    assert len(ignoring) > 30
    assert [ln for ln in ignoring if not ("type: ignore[" in ln and "pyright: ignore[" in ln)] == []


@pytest.fixture(scope="session")
def symbols() -> list[dict[str, Any]]:
    """What pyright knows of all symbols of the package."""
    # Outside the repository's own configuration: the package is looked at as an installed one.
    reported = json.loads(pyright("--verifytypes", "opero", "--ignoreexternal", "--outputjson"))
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
