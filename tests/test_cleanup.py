# this_file: tests/test_cleanup.py
"""`cleanup.py`: what it installs when, which commands it runs, what it prints on failure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cleanup.py"
TABLE: dict[str, Any] = {
    "build-system": {"requires": ["hatchling"]},
    "project": {
        "name": "opero",
        "classifiers": [
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3.12",
        ],
    },
    "dependency-groups": {
        "examples": ["httpx"],
        "test": [{"include-group": "examples"}, "pytest"],
        "lint": ["ruff"],
        "dev": [{"include-group": "test"}, {"include-group": "lint"}, "httpx"],
    },
    "tool": {
        "hatch": {
            "envs": {
                "default": {
                    "scripts": {
                        "test": "pytest {args}",
                        "style": ["ruff format --check", "ruff check 'a b'"],
                        "all": ["style", "test -q {args}"],
                    }
                }
            }
        }
    },
}


@pytest.fixture
def home(cleanup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project of its own."""
    monkeypatch.setattr(cleanup, "ROOT", tmp_path)
    monkeypatch.setattr(cleanup, "project", lambda _: TABLE)
    return tmp_path


class Installer:
    """Stands in for venv and pip: makes folders, remembers what was asked for, fails on demand."""

    def __init__(self, env: Any, cleanup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.env, self.asked, self.broken = env, [], False
        self.error = cleanup.SetupError
        monkeypatch.setattr(cleanup.Environment, "make", lambda env: env.path.mkdir(exist_ok=True))
        monkeypatch.setattr(cleanup.Environment, "install", lambda _, names: self.install(names))

    def install(self, names: list[str]) -> None:
        if self.broken:
            raise self.error("no network")
        self.asked.append(names)


@pytest.fixture
def installer(cleanup: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    env = cleanup.Environment(home / ".venv", sys.executable, "3.11")
    return Installer(env, cleanup, monkeypatch)


# --- pyproject.toml -------------------------------------------------------------------------------


def test_groups_are_unfolded_each_requirement_once(cleanup: ModuleType) -> None:
    assert cleanup.group_members(TABLE, "dev") == ["httpx", "pytest", "ruff"]


def test_scripts_are_unfolded_with_their_arguments(cleanup: ModuleType) -> None:
    assert list(cleanup.script_commands(TABLE, "all", ["-k", "a b"])) == [
        ["ruff", "format", "--check"],
        ["ruff", "check", "a b"],
        ["pytest", "-q", "-k", "a b"],
    ]


def test_supported_pythons_are_those_of_the_classifiers(cleanup: ModuleType) -> None:
    assert cleanup.supported_pythons(TABLE) == ["3.12"]


@pytest.mark.parametrize(
    ("part", "counts"),
    [("build-system", True), ("project", True), ("dependency-groups", True), ("tool", False)],
)
def test_fingerprint_changes_with_what_is_installed(
    cleanup: ModuleType, part: str, counts: bool
) -> None:
    changed = {**TABLE, part: {"other": ["x"]}}
    assert (cleanup.fingerprint(changed) != cleanup.fingerprint(TABLE)) is counts


# --- the environment ------------------------------------------------------------------------------


def test_nothing_is_installed_twice(installer: Installer) -> None:
    installer.env.ensure("test")
    installer.env.ensure("test")
    assert installer.asked == [["httpx", "pytest"]]


def test_a_group_that_is_part_of_an_installed_one_is_there(installer: Installer) -> None:
    installer.env.ensure("dev")
    installer.env.ensure("test", "lint")
    assert installer.asked == [["httpx", "pytest", "ruff"]]


def test_another_group_is_added_and_the_first_one_stays(installer: Installer) -> None:
    installer.env.ensure("test")
    installer.env.ensure("lint")
    installer.env.ensure("test", "lint")
    assert installer.asked == [["httpx", "pytest"], ["ruff"]]


def test_changed_dependencies_are_installed(
    installer: Installer, cleanup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.env.ensure("lint")
    monkeypatch.setattr(cleanup, "project", lambda _: {**TABLE, "project": {"name": "other"}})
    installer.env.ensure("lint")
    assert len(installer.asked) == 2


def test_an_install_that_broke_off_is_done_again(installer: Installer) -> None:
    installer.env.ensure("test")
    installer.broken = True
    with pytest.raises(installer.error):
        installer.env.ensure("lint")
    installer.broken = False
    installer.env.ensure("test")
    assert installer.asked == [["httpx", "pytest"]] * 2


def test_a_damaged_stamp_counts_as_none(installer: Installer, cleanup: ModuleType) -> None:
    installer.env.ensure("test")
    (installer.env.path / cleanup.STAMP).write_text("{", encoding="utf-8")
    installer.env.ensure("test")
    assert len(installer.asked) == 2


def test_a_folder_that_is_no_environment_is_not_removed(cleanup: ModuleType, home: Path) -> None:
    precious = home / ".venv" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(cleanup.SetupError, match="no virtual environment"):
        cleanup.Environment(home / ".venv", sys.executable, "3.11").make()
    assert precious.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for venv with a shell script")
@pytest.mark.parametrize("state", ["dead", "other version"])
def test_an_unusable_environment_is_replaced(
    cleanup: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("PATH", str(home))  # no uv there
    maker = home / "python"
    maker.write_text('#!/bin/sh\n/bin/mkdir -p "$3"\n', encoding="utf-8")
    maker.chmod(0o755)
    env = cleanup.Environment(home / ".venv", str(maker), "3.11")
    env.programs.mkdir(parents=True)
    (env.path / "pyvenv.cfg").touch()
    if state == "other version":
        env.python.write_text("#!/bin/sh\necho 3.99\n", encoding="utf-8")
        env.python.chmod(0o755)
    env.make()
    assert list(env.path.iterdir()) == []


def test_a_missing_program_is_reported_with_a_way_to_install_it(
    cleanup: ModuleType, home: Path
) -> None:
    env = cleanup.Environment(home / ".venv", sys.executable, "3.11")
    with pytest.raises(cleanup.SetupError, match=r"ruff is not in .venv. Run: python cleanup.py"):
        env.resolve(["ruff", "check"])


def test_commands_keep_what_they_compile(
    cleanup: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    variables = cleanup.Environment(home / ".venv", sys.executable, "3.11").variables()
    assert "PYTHONDONTWRITEBYTECODE" not in variables
    assert variables["VIRTUAL_ENV"] == str(home / ".venv")


@pytest.mark.parametrize(("codes", "first"), [([0, 0], 0), ([3, 0], 3), ([0, 4], 4), ([3, 4], 3)])
def test_a_script_runs_to_its_end_and_returns_its_first_failure(
    cleanup: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch, codes: list[int], first: int
) -> None:
    left = list(codes)
    monkeypatch.setattr(cleanup.Environment, "resolve", lambda _, words: words)
    monkeypatch.setattr(
        cleanup.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], left.pop(0))
    )
    assert cleanup.Environment(home / ".venv", "", "").run("style") == first
    assert left == []


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("Temporary failure in name resolution", "package index could not be reached"),
        ("ERROR: No matching distribution found for ruff", "package index could not be reached"),
        ("error sending request for url", "package index could not be reached"),
        ("ensurepip is not available", "apt install python3-venv"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
    ],
)
def test_a_failure_comes_with_advice(cleanup: ModuleType, output: str, advice: str) -> None:
    assert advice in cleanup.hint(f"first line\n{output}\n")


def test_passwords_and_other_folders_are_not_shown(cleanup: ModuleType, home: Path) -> None:
    shown = cleanup.hint(
        f"Looking in https://me:secret@host/simple\nat {home}/setup {Path.home()}/x"
    )
    assert "secret" not in shown
    assert str(home) not in shown
    assert str(Path.home()) not in shown


def test_help_names_every_command(cleanup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cleanup.main(["-h"])
    printed = capsys.readouterr().out
    assert [name for name in cleanup.COMMANDS if f"\n    {name} " not in printed] == []


def test_commands_that_run_nothing_take_no_further_arguments(cleanup: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cleanup.main(["lint", "--wrong"])


def test_test_passes_its_arguments_to_pytest(
    cleanup: ModuleType, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[object] = []
    monkeypatch.setattr(cleanup.Environment, "run", lambda _, name, args: ran.append((name, args)))
    cleanup.main(["test", "-k", "retry and not slow", "-x"])
    assert ran == [("test", ["-k", "retry and not slow", "-x"])]


@pytest.mark.parametrize("permitted", [True, False])
def test_test_all_runs_again_on_a_clock_that_has_just_started(
    cleanup: ModuleType,
    installer: Installer,
    monkeypatch: pytest.MonkeyPatch,
    permitted: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    under = ["unshare", "--time"] if permitted else []
    ran: list[object] = []
    given: list[object] = []

    def run(_: object, __: str, args: list[str], **options: object) -> None:
        ran.append(options.get("under"))
        given.append(args)

    monkeypatch.setattr(cleanup.Environment, "run", run)
    monkeypatch.setattr(cleanup, "other_environments", lambda: iter(()))
    monkeypatch.setattr(cleanup, "just_started", lambda: under)
    cleanup.main(["test", "--all"])
    assert ran == [None, *([under] if permitted else [])]
    assert given == [["--hypothesis-profile=drawn"], *([[]] if permitted else [])]
    assert ("not permitted, skipped" in capsys.readouterr().err) is not permitted


def test_a_command_under_the_fresh_clock_sees_seconds_of_uptime(cleanup: ModuleType) -> None:
    under = cleanup.just_started()
    if not under:
        pytest.skip("this machine permits no time namespace")
    ask = "import time; print(time.monotonic())"
    seen = subprocess.run([*under, sys.executable, "-c", ask], capture_output=True, check=True)
    assert 10 < float(seen.stdout) < 42


def test_an_old_python_is_refused_with_a_message() -> None:
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 1, 'final', 0); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer; this is 3.9" in done.stderr


# --- files and status -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "verdict"),
    [
        ("a.py", "# this_file: a.py\n", True),
        ("a.py", "#!/usr/bin/env python3\n# this_file: a.py\n", True),
        ("a.py", "# this_file: b.py\n", False),
        ("a.py", "", False),
        ("a.toml", "[x]\n# this_file: a.toml\n", False),
        ("a.md", "---\nthis_file: a.md\n---\n", True),
        ("a.md", "# this_file: a.md\n", False),
        ("a.png", "", None),
    ],
)
def test_a_file_says_where_it_is(
    cleanup: ModuleType, home: Path, path: str, text: str, verdict: bool | None
) -> None:
    (home / path).write_text(text, encoding="utf-8")
    assert cleanup.says_where(path) is verdict


def test_without_git_the_sources_are_all_but_caches(cleanup: ModuleType, home: Path) -> None:
    for path in ("a.py", ".ci/run", "src/b.py", "src/__pycache__/b.pyc", ".venv-3.12/c.py"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).touch()
    assert cleanup.sources() == [".ci/run", "a.py", "src/b.py"]


def test_a_failed_check_shows_what_it_said(
    cleanup: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="a.py:1: F401\nFound 1 error.\n")
    monkeypatch.setattr(cleanup, "capture", lambda *_: done)
    monkeypatch.setattr(cleanup.Environment, "resolve", lambda _, words: words)
    row = cleanup.script_row(cleanup.Environment(home / ".venv", "", ""), "style")
    assert row.failed
    assert "a.py:1: F401" in str(row)


@pytest.mark.parametrize(
    ("closing", "code", "shown"),
    [
        ("412 passed, 3 skipped in 14.80s", 0, "412 passed, 3 skipped"),
        ("==== 1 failed, 2 passed in 0.10s ====", 1, "1 failed, 2 passed"),
        ("ImportError while loading conftest", 4, "did not run"),
    ],
)
def test_status_shows_how_the_tests_ended(
    cleanup: ModuleType,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    closing: str,
    code: int,
    shown: str,
) -> None:
    done = subprocess.CompletedProcess([], code, stdout=f"...\n{closing}\n")
    monkeypatch.setattr(cleanup, "capture", lambda *_: done)
    monkeypatch.setattr(cleanup.Environment, "resolve", lambda _, words: words)
    row = cleanup.tests_row(cleanup.Environment(home / ".venv", "", ""))
    assert (row.verdict, row.failed) == (shown, code != 0)


def test_todo_row_counts_boxes_and_names_the_next(cleanup: ModuleType, home: Path) -> None:
    text = "- [x] options\n- [ ] retry\n  - [X] pauses\n- [ ] cache\n"
    (home / "TODO.md").write_text(text, encoding="utf-8")
    assert cleanup.todo_row().detail == '2 of 4 boxes ticked, next: "retry"'


def test_status_exit_code_counts_failed_sections(
    cleanup: ModuleType,
    installer: Installer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def row(_: object, name: str = "tests") -> Any:
        return cleanup.Row(name, "", "", failed=name in {"check-lint", "check-types"})

    monkeypatch.setattr(cleanup, "WORKSHOP", ("test", "lint"))
    monkeypatch.setattr(cleanup, "script_row", row)
    monkeypatch.setattr(cleanup, "tests_row", row)
    monkeypatch.setattr(cleanup, "REQUIRED", ())
    assert cleanup.main(["status"]) == 2
    assert "check-layers" in capsys.readouterr().out


# --- git ------------------------------------------------------------------------------------------


@pytest.fixture
def repository(home: Path) -> Path:
    for words in (["init", "-q"], ["config", "user.name", "a"], ["config", "user.email", "a@b.c"]):
        subprocess.run(["git", *words], cwd=home, check=True)
    (home / "new.txt").touch()
    return home


def commits(repository: Path) -> str:
    return subprocess.run(
        ["git", "log", "--format=%s"], cwd=repository, capture_output=True, text=True, check=False
    ).stdout


def test_update_commits_nothing_without_yes(
    cleanup: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cleanup.main(["update"]) == 0
    assert "new.txt" in capsys.readouterr().out
    assert commits(repository) == ""


def test_update_with_yes_commits_everything(cleanup: ModuleType, repository: Path) -> None:
    assert cleanup.main(["update", "--yes", "-m", "A change"]) == 0
    assert commits(repository) == "A change\n"
    assert cleanup.git("status", "--porcelain").stdout == ""


def test_push_does_nothing_without_yes(
    cleanup: ModuleType, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    cleanup.git("init", "-q", "--bare", str(elsewhere))
    cleanup.git("remote", "add", "origin", str(elsewhere))
    cleanup.main(["update", "--yes", "-m", "first"])
    cleanup.git("push", "-q", "--set-upstream", "origin", "HEAD")
    (repository / "more.txt").touch()
    cleanup.main(["update", "--yes", "-m", "second"])
    assert cleanup.main(["push"]) == 0
    assert commits(elsewhere) == "first\n"
    assert cleanup.main(["push", "--yes"]) == 0
    assert commits(elsewhere) == "second\nfirst\n"


def test_push_without_an_upstream_branch_says_what_to_do(
    cleanup: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cleanup.main(["push", "--yes"]) == 2
    assert "git push --set-upstream" in capsys.readouterr().err


def test_stamp_records_what_is_installed(installer: Installer, cleanup: ModuleType) -> None:
    installer.env.ensure("lint")
    stamp = json.loads((installer.env.path / cleanup.STAMP).read_text(encoding="utf-8"))
    assert stamp == {"fingerprint": cleanup.fingerprint(TABLE), "installed": ["ruff"]}
