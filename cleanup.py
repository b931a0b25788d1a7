#!/usr/bin/env python3
# this_file: cleanup.py
"""One door to every chore: `python cleanup.py test`, `demo`, `lint`, `status` ... (`-h` lists all).

It needs nothing but Python 3.11 or newer. The first command that needs packages makes `.venv` and
installs what that command uses, with uv where it is found, else with venv and pip; later runs use
it again until the dependencies in pyproject.toml change. The commands themselves stand in
pyproject.toml under `[tool.hatch.envs.default.scripts]`.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "opero needs Python 3.11 or newer; this is {}.{}. "
        "Write python3.11, python3.12 or python3.13 in place of python.".format(*sys.version_info)
    )

import argparse
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
STAMP = "opero-stamp.json"
REQUIRED = (
    *("README.md", "TODO.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "cleanup.py"),
    *("ARCHITECTURE.md", "CONTRIBUTING.md"),
    *(".ci/run", ".gitignore", "src/opero/py.typed"),
)
HEADED = (".py", ".pyi", ".toml", ".sh", ".yaml", ".yml", ".md")
CHECKS = ("check-format", "check-lint", "check-types", "check-layers")
WORKSHOP = ("test", "typing", "lint")
"""Groups that the checks need: types are checked against the packages that the tests use."""


class SetupError(Exception):
    """Something that the person at the keyboard can mend; the message says how."""


def say(text: str) -> None:
    """Print progress on stderr: stdout belongs to the commands."""
    print(text, file=sys.stderr, flush=True)


# --- pyproject.toml -------------------------------------------------------------------------------


@functools.cache
def project(root: Path) -> dict[str, Any]:
    """Return pyproject.toml as a dictionary."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def group_members(table: dict[str, Any], *names: str) -> list[str]:
    """Return the requirements of dependency groups, included ones unfolded, each once."""
    found: dict[str, None] = {}
    for name in names:
        for member in table["dependency-groups"][name]:
            if isinstance(member, dict):
                found.update(dict.fromkeys(group_members(table, member["include-group"])))
            else:
                found[member] = None
    return list(found)


def fingerprint(table: dict[str, Any]) -> str:
    """Return a digest of what decides which packages are installed; tool settings do not count."""
    parts = [table.get(name) for name in ("build-system", "project", "dependency-groups")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def script_commands(
    table: dict[str, Any], name: str, args: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Yield the commands of a hatch script as words, with `{args}` and other scripts filled in."""
    scripts = table["tool"]["hatch"]["envs"]["default"]["scripts"]
    lines = scripts[name] if isinstance(scripts[name], list) else [scripts[name]]
    for line in lines:
        words: list[str] = []
        for word in shlex.split(line):
            words.extend(args if word == "{args}" else [word])
        if words[0] in scripts:
            yield from script_commands(table, words[0], words[1:])
        else:
            yield words


def supported_pythons(table: dict[str, Any]) -> list[str]:
    """Return the versions that the classifiers name: ["3.11", "3.12", ...]."""
    matches = (re.search(r"Python :: (3\.\d+)$", line) for line in table["project"]["classifiers"])
    return [match[1] for match in matches if match]


# --- the environment ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A virtual environment of the project.

    Attributes:
        path: Its folder.
        base: Interpreter that it is made from.
        version: Version of that interpreter, like "3.11".
    """

    path: Path
    base: str
    version: str

    @property
    def programs(self) -> Path:
        """The folder of its programs."""
        return self.path / ("Scripts" if os.name == "nt" else "bin")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.programs / ("python.exe" if os.name == "nt" else "python")

    def stamp(self) -> dict[str, Any]:
        """Return what was installed last, {} when nothing was or an install broke off."""
        try:
            return dict(json.loads((self.path / STAMP).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def ensure(self, *groups: str) -> Environment:
        """Make the environment and install opero with the named groups, unless that is done."""
        self.make()
        table, stamp = project(ROOT), self.stamp()
        wanted, mark = group_members(table, *groups), fingerprint(table)
        there = stamp["installed"] if stamp.get("fingerprint") == mark else None
        if there is not None and set(wanted) <= set(there):
            return self
        # Without a stamp an install that breaks off is begun again.
        (self.path / STAMP).unlink(missing_ok=True)
        self.install(wanted)
        stamp = {"fingerprint": mark, "installed": sorted({*wanted, *(there or ())})}
        (self.path / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        return self

    def make(self) -> None:
        """Make the environment; one of another Python or one that no longer starts is replaced."""
        if self.path.exists():
            if works(self.python, self.version):
                return
            if not (self.path / "pyvenv.cfg").is_file():
                raise SetupError(
                    f"{self.path.name} is no virtual environment: move it away and run this again."
                )
            shutil.rmtree(self.path)
        say(f"Making {self.path.name} with Python {self.version}.")
        uv = shutil.which("uv")
        by_uv = [str(uv), "venv", "--quiet", "--no-project", "--python", self.base, str(self.path)]
        done = capture(by_uv if uv else [self.base, "-m", "venv", str(self.path)])
        if done.returncode:
            shutil.rmtree(self.path, ignore_errors=True)
            raise SetupError(f"{self.path.name} could not be made.{hint(done.stdout)}")

    def install(self, requirements: Sequence[str]) -> None:
        """Install opero in editable form together with `requirements`."""
        uv = shutil.which("uv")
        if uv:
            installer = [uv, "pip", "install", "--quiet", "--compile-bytecode"]
            installer += ["--python", str(self.python)]
        else:
            installer = [
                str(self.python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
            if capture(
                [str(self.python), "-c", "import pip"]
            ).returncode:  # uv made this environment
                capture([str(self.python), "-m", "ensurepip"])
        say(
            f"Installing opero and {len(requirements)} packages for its workshop "
            f"with {'uv' if uv else 'pip; the first time this takes a minute or two'}."
        )
        done = capture([*installer, "--editable", ".", *requirements])
        if done.returncode:
            raise SetupError(f"The installation failed.{hint(done.stdout)}")

    def variables(self) -> dict[str, str]:
        """Return the process environment with this environment activated.

        Compiled modules are kept: the tests start some thousand processes that import opero.
        """
        left_out = ("PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
        active = {name: value for name, value in os.environ.items() if name not in left_out}
        active["PATH"] = os.pathsep.join([str(self.programs), active.get("PATH", os.defpath)])
        active["VIRTUAL_ENV"] = str(self.path)
        return active

    def resolve(self, words: Sequence[str]) -> list[str]:
        """Return a command with its program's path in this environment."""
        program = shutil.which(words[0], path=str(self.programs))
        if program is None:
            raise SetupError(
                f"{words[0]} is not in {self.path.name}. Run: python cleanup.py install"
            )
        return [program, *words[1:]]

    def run(self, script: str, args: Sequence[str] = (), *, under: Sequence[str] = ()) -> int:
        """Run a script of pyproject.toml to its end; return the first exit code that is not 0.

        `under` stands before each command: a program that runs it in other surroundings.
        """
        code = 0
        for words in script_commands(project(ROOT), script, args):
            command = [*under, *self.resolve(words)]
            done = subprocess.run(command, cwd=ROOT, env=self.variables(), check=False)
            code = code or done.returncode
        return code


def capture(
    command: Sequence[str], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command at the root and collect what it prints, stderr included."""
    try:
        return subprocess.run(
            command, cwd=ROOT, env=env, check=False, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return subprocess.CompletedProcess(
            list(command), 127, stdout=f"{command[0]}: {error.strerror}"
        )


ASK_VERSION = "import sys; print('{}.{}'.format(*sys.version_info))"
ASK_PATH = "import sys; print(sys.executable)"


def works(python: str | Path, version: str) -> bool:
    """Return whether an interpreter has that version and starts: a shim may have no target."""
    asked = capture([str(python), "-c", ASK_VERSION])
    return asked.returncode == 0 and asked.stdout.strip() == version


HINTS = {
    r"ensurepip|No module named venv": (
        "This Python comes without its venv module. On Debian: apt install python3-venv. "
        "Or install uv."
    ),
    r"name resolution|Max retries|NewConnection|ConnectionError|timed out|dns error|Failed to fetch"
    r"|error sending request|Could not fetch|No matching distribution|Connection (refused|reset)": (
        "The package index could not be reached, or lacks a package. Check the connection, proxy "
        "and index settings; the same command takes up where it stopped."
    ),
    r"No space left": "The disk is full.",
}


def hint(output: str) -> str:
    """Return the end of a failed command's output, without passwords, and what to do about it."""
    tail = [line for line in output.splitlines() if line.strip()][-12:]
    text = re.sub(r"(?<=://)[^/\s@]+@", "***@", "\n".join(f"  {line}" for line in tail))
    text = text.replace(str(ROOT) + os.sep, "").replace(str(Path.home()), "~")
    advice = [advice for pattern, advice in HINTS.items() if re.search(pattern, output)]
    return "".join(f"\n{part}" for part in (text, *advice[:1]) if part)


def own_environment() -> Environment:
    """Return `.venv` for the Python that runs this script."""
    # Inside `.venv` the interpreter itself may have to be replaced, so ask for the one behind it.
    base = getattr(sys, "_base_executable", None) or sys.executable
    return Environment(ROOT / ".venv", base, "{}.{}".format(*sys.version_info))


def other_environments() -> Iterator[Environment]:
    """Yield an environment for every other supported Python that is found here."""
    for version in supported_pythons(project(ROOT)):
        if version != own_environment().version:
            base = next((p for p in candidates(version) if works(p, version)), None)
            if base is None:
                say(f"Python {version}: not found, skipped.")
            else:
                yield Environment(ROOT / f".venv-{version}", base, version)


def just_started() -> list[str]:
    """Return the command under which the monotonic clock says that the machine runs for 12 s.

    It needs Linux and the right to make a time namespace; without them the list is empty.
    """
    unshare, file = shutil.which("unshare"), Path("/proc/self/timens_offsets")
    if unshare is None or not file.exists():
        return []
    # Offsets count from the machine's own clock, also where this runs in a time namespace already.
    offsets = dict(line.split()[:2] for line in file.read_text().splitlines())
    shift = 12 - int(time.clock_gettime(time.CLOCK_BOOTTIME)) + int(offsets["boottime"])
    command = [unshare, "--time", f"--monotonic={shift}", f"--boottime={shift}", "--"]
    return [] if capture([*command, sys.executable, "-c", ""]).returncode else command


def candidates(version: str) -> Iterator[str]:
    """Yield places where a Python may be: the PATH, pyenv's folder, the Windows launcher."""
    if found := shutil.which(f"python{version}"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for folder in sorted(pyenv.glob(f"{version}.*"), reverse=True):
        yield str(folder / "bin" / "python")
    if launcher := shutil.which("py"):
        yield capture([launcher, f"-{version}", "-c", ASK_PATH]).stdout.strip()


# --- files ----------------------------------------------------------------------------------------


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """Run git at the root."""
    return capture(["git", *words])


def sources() -> list[str]:
    """Return the project's files: what git tracks or would track, else all but caches."""
    if (ROOT / ".git").exists():
        listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
        if listed.returncode == 0:
            return sorted({p for p in listed.stdout.split("\0") if p and (ROOT / p).is_file()})
    return sorted(_walk(ROOT))


def _walk(folder: Path) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry.relative_to(ROOT).as_posix()
        elif entry.name == ".ci" or not entry.name.startswith(
            (".", "__pycache__", "build", "dist")
        ):
            yield from _walk(entry)


def says_where(path: str) -> bool | None:
    """Return whether a file's first line (Markdown: front matter) names its path; None: it cannot."""
    if path != ".ci/run" and not path.endswith(HEADED):
        return None
    lines = [*(ROOT / path).read_text(encoding="utf-8").splitlines()[:3], "", "", ""]
    if path.endswith(".md"):
        return lines[:3] == ["---", f"this_file: {path}", "---"]
    return lines[lines[0].startswith("#!")] == f"# this_file: {path}"


# --- status ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the status table: what was looked at, how it went, what went wrong."""

    name: str
    detail: str
    verdict: str
    failed: bool = False
    seconds: float | None = None
    evidence: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the line, with a few lines of evidence below it after a failure."""
        took = "" if self.seconds is None else f"{self.seconds:8.1f} s"
        line = f"  {self.name:<10} {self.detail:<50} {self.verdict:<24}{took}".rstrip()
        return "\n".join([line, *(f"             {text}" for text in self.evidence)])


def files_row() -> Row:
    """Look for the files that every checkout must have."""
    missing = [name for name in REQUIRED if not (ROOT / name).is_file()]
    verdict = f"missing: {', '.join(missing)}" if missing else "ok"
    return Row("files", "README.md TODO.md LICENSE CHANGELOG.md ...", verdict, failed=bool(missing))


def this_file_row() -> Row:
    """Look whether each file says where it is."""
    said = {path: says_where(path) for path in sources()}
    wrong = [path for path, right in said.items() if right is False]
    total = sum(right is not None for right in said.values())
    return Row(
        "this_file",
        f"{total - len(wrong)} of {total} files say where they are",
        "wrong" if wrong else "ok",
        failed=bool(wrong),
        evidence=tuple(wrong[:8]),
    )


def script_row(env: Environment, name: str) -> Row:
    """Run a check and keep what it says if it fails."""
    began, commands = time.perf_counter(), list(script_commands(project(ROOT), name))
    runs = [capture(env.resolve(words), env.variables()) for words in commands]
    failed = [run.stdout for run in runs if run.returncode]
    evidence = [line[:150] for text in failed for line in text.splitlines() if line.strip()]
    return Row(
        name.removeprefix("check-"),
        ", ".join(" ".join(words) for words in commands),
        "failed" if failed else "ok",
        failed=bool(failed),
        seconds=time.perf_counter() - began,
        evidence=tuple(evidence[-6:]),
    )


def tests_row(env: Environment) -> Row:
    """Run the tests."""
    (words,) = script_commands(project(ROOT), "test", ["-q", "-r", "fE", "--tb=no"])
    began, run = time.perf_counter(), capture(env.resolve(words), env.variables())
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    closing = re.search(
        r"(\d+ (?:passed|failed|error)[^=]*?) in [\d.]+", lines[-1] if lines else ""
    )
    return Row(
        "tests",
        "pytest -q",
        closing[1] if closing else "did not run",
        failed=run.returncode != 0,
        seconds=time.perf_counter() - began,
        evidence=tuple(line[:150] for line in lines[-7:-1]) if run.returncode else (),
    )


def todo_row() -> Row:
    """Count the boxes of the roadmap."""
    path = ROOT / "TODO.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    boxes = re.findall(r"^\s*- \[([ xX])\] (.+)$", text, flags=re.MULTILINE)
    left = [title for mark, title in boxes if mark == " "]
    following = f', next: "{left[0]}"' if left else ""
    return Row("todo", f"{len(boxes) - len(left)} of {len(boxes)} boxes ticked{following}", "")


def heading() -> str:
    """Return the first line of the table: when, on which Python, in which state."""
    branch, changes = git("branch", "--show-current"), git("status", "--porcelain")
    state = "no git repository"
    if branch.returncode == 0:
        changed = len(changes.stdout.splitlines())
        state = f"branch {branch.stdout.strip() or 'detached'} ({changed} changed)"
    now, python = time.strftime("%Y-%m-%d %H:%M"), sys.version.split()[0]
    return f"opero status  {now}   python {python}   {state}"


# --- commands -------------------------------------------------------------------------------------


def do_venv(_: argparse.Namespace, __: list[str]) -> int:
    """Make an empty .venv, unless there is one."""
    env = own_environment()
    env.make()
    print(f"{env.path.name} is there: Python {env.version}")
    return 0


def do_install(_: argparse.Namespace, __: list[str]) -> int:
    """Install opero in editable form with everything its developers use."""
    env = own_environment().ensure("dev")
    print(f"opero is installed in {env.path.name}: Python {env.version}")
    return 0


def do_demo(_: argparse.Namespace, extra: list[str]) -> int:
    """Run examples/demo.py: real HTTP calls to a server that misbehaves, offline."""
    return own_environment().ensure("examples").run("demo", extra)


def do_test(options: argparse.Namespace, extra: list[str]) -> int:
    """Run the tests; further arguments go to pytest."""
    code = 0
    # Property tests have the same examples each time; here they draw new and more ones.
    drawn = ["--hypothesis-profile=drawn"] if options.all else []
    if not options.other_pythons:
        code = own_environment().ensure("test").run("test", [*drawn, *extra])
    if options.all or options.other_pythons:
        for env in other_environments():
            say(f"Python {env.version}:")
            code = env.ensure("test").run("test", extra) or code
    if options.all:
        under = just_started()
        say("On a machine that has just started" + (":" if under else ": not permitted, skipped."))
        if under:
            code = own_environment().run("test", extra, under=under) or code
    return code


def do_bench(_: argparse.Namespace, extra: list[str]) -> int:
    """Run benchmarks/run.py: opero beside its peers."""
    return own_environment().ensure("test", "bench").run("bench", extra)


def do_mutate(_: argparse.Namespace, extra: list[str]) -> int:
    """Change one operator after the other and see whether a test fails; takes an hour.

    An argument such as "opero.limits.gcra*" chooses what is changed; without one the survivors are listed at the end.
    """
    env = own_environment().ensure("test", "mutate")
    # Where some are chosen, all others would stand in the list as not checked.
    return env.run("mutate", extra) or (0 if extra else env.run("survivors"))


def do_lint(_: argparse.Namespace, __: list[str]) -> int:
    """Check format, lint, types and layers; the exit code counts the checks that failed."""
    env, failed = own_environment().ensure(*WORKSHOP), []
    for check in CHECKS:
        print(f"{check}:", flush=True)
        if env.run(check):
            failed.append(check)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return len(failed)


def do_fix(_: argparse.Namespace, __: list[str]) -> int:
    """Mend what ruff can mend, and format."""
    return own_environment().ensure("lint").run("format")


def do_status(_: argparse.Namespace, __: list[str]) -> int:
    """Show the state of everything in one table; the exit code counts the sections that failed.

    Changes no file of the project. A missing or outdated .venv is made first; git ignores it.
    """
    env = own_environment().ensure(*WORKSHOP)
    print(heading(), flush=True)
    sections: list[Callable[[], Row]] = [files_row, this_file_row]
    sections += [functools.partial(script_row, env, check) for check in CHECKS]
    sections += [functools.partial(tests_row, env), todo_row]
    failed = 0
    for section in sections:
        row = section()
        failed += row.failed
        print(row, flush=True)
    return failed


def do_update(options: argparse.Namespace, __: list[str]) -> int:
    """Commit everything that git does not ignore; only with --yes, else print what would happen."""
    changes = git("status", "--short")
    if changes.returncode:
        raise SetupError("This is no git repository, or git is not installed.")
    if not changes.stdout.strip():
        print("Nothing to commit.")
        return 0
    print(changes.stdout.rstrip())
    if not options.yes:
        print(f'Would commit this as "{options.message}". To do it: python cleanup.py update --yes')
        return 0
    return _report(git("add", "--all")) or _report(git("commit", "--quiet", "-m", options.message))


def do_push(options: argparse.Namespace, __: list[str]) -> int:
    """Push the current branch; only with --yes, else print what would happen."""
    ahead = git("log", "--oneline", "@{upstream}..")
    if ahead.returncode:
        raise SetupError(
            "This branch follows no other. Once: git push --set-upstream origin BRANCH"
        )
    print(ahead.stdout.rstrip() or "Nothing to push.")
    if not options.yes:
        print("Would push these commits. To do it: python cleanup.py push --yes")
        return 0
    return _report(git("push", "--quiet"))


def _report(done: subprocess.CompletedProcess[str]) -> int:
    if done.returncode:
        say(f"git said no.{hint(done.stdout)}")
    return done.returncode


COMMANDS: dict[str, Callable[[argparse.Namespace, list[str]], int]] = {
    "venv": do_venv,
    "install": do_install,
    "demo": do_demo,
    "test": do_test,
    "bench": do_bench,
    "mutate": do_mutate,
    "lint": do_lint,
    "fix": do_fix,
    "status": do_status,
    "update": do_update,
    "push": do_push,
}
PASS_ON = ("demo", "test", "bench", "mutate")


def parser() -> argparse.ArgumentParser:
    """Return the command line: one sub-command per chore, described by its docstring."""
    top = argparse.ArgumentParser(
        prog="cleanup.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    chores = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, do in COMMANDS.items():
        text = do.__doc__ or ""
        chore = chores.add_parser(
            name, help=text.partition("\n")[0], description=text, allow_abbrev=False
        )
        if name in {"update", "push"}:
            chore.add_argument("--yes", action="store_true", help="really do it")
        if name == "update":
            chore.add_argument("-m", "--message", default="Update repository files")
        if name == "test":
            which = chore.add_mutually_exclusive_group()
            which.add_argument(
                "--all",
                action="store_true",
                help="property tests with new examples, also each other supported Python found, in "
                "its own environment, and once a clock that says the machine has just started",
            )
            which.add_argument("--other-pythons", action="store_true", help="only on those others")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    top = parser()
    options, extra = top.parse_known_args(arguments)
    if extra and options.command not in PASS_ON:
        top.error(f"{options.command} takes no argument {extra[0]!r}")
    try:
        return COMMANDS[options.command](options, extra[1:] if extra[:1] == ["--"] else extra)
    except SetupError as error:
        say(f"cleanup.py: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
