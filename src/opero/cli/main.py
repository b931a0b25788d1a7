# this_file: src/opero/cli/main.py
"""Parse the command line, run a command, and turn errors into exit codes; the command `info`."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from opero.caching.stores.disk import default_folder
from opero.cli.commands import add_cache_commands, add_workflow_commands, as_json, as_table
from opero.errors import OperoError, OperoWarning
from opero.utils.secrets import mask_url

__all__ = ["Info", "collect_info", "main"]

_FAILED: Final = 1
_INTERRUPTED: Final = 130  # as in shells: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Those after `opero`; None for those of this process.

    Returns:
        The exit code: 0, or 1 for an error of opero's, which is written to stderr. Wrong arguments end in
        `SystemExit(2)`, as with every argparse program.
    """
    given = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # A warning for programs that continue is an error of a command.
            warnings.simplefilter("ignore", OperoWarning)
            code: int = given.run(given)
        sys.stdout.flush()
    except OperoError as error:
        sys.stderr.write(f"opero: {error}\n")
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe (`opero cache list | head`); the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opero", description="Inspect and manage what opero stores on this machine."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info = commands.add_parser("info", help="versions, installed extras, cache folder")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    add_cache_commands(commands)
    add_workflow_commands(commands)
    return parser


# --- opero info -------------------------------------------------------------------------------------

_HIDDEN: Final = frozenset({"all", "dev", "test"})
"""Extras without a feature of their own."""

_VARIABLES: Final = ("OPERO_CACHE_DIR", "OPERO_REDIS_URL", "OPERO_DISABLE")

_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9][\w.-]*).*?(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")


@dataclass(frozen=True)
class Info:
    """Facts about this installation.

    Attributes:
        opero: Its version; None for a copy of the source that is not installed.
        python: Version and implementation of the interpreter, and the system.
        location: Folder of the package.
        cache_folder: Where `cache_backend="disk"` keeps its entries.
        cache_exists: Whether that folder exists.
        environment: Variables that opero reads, as far as they are set.
        needs: Version of each library that opero needs, None for a missing one.
        extras: The same for the libraries of each extra.
    """

    opero: str | None
    python: str
    location: str
    cache_folder: str
    cache_exists: bool
    environment: dict[str, str]
    needs: dict[str, str | None]
    extras: dict[str, dict[str, str | None]]


def collect_info() -> Info:
    """Return the facts about this installation."""
    import opero

    folder = default_folder()
    needs, extras = _requirements()
    return Info(
        opero=_version("opero"),
        python=f"{platform.python_version()} ({platform.python_implementation()}, {platform.system()})",
        location=str(Path(opero.__file__).parent),
        cache_folder=folder,
        cache_exists=Path(folder).is_dir(),
        environment={name: mask_url(os.environ[name]) for name in _VARIABLES if name in os.environ},
        needs={name: _version(name) for name in needs},
        extras={extra: {name: _version(name) for name in names} for extra, names in extras.items()},
    )


def _info(given: argparse.Namespace) -> int:
    info = collect_info()
    print(as_json(asdict(info)) if given.json else _text(info))
    return 0


def _text(info: Info) -> str:
    exists = "" if info.cache_exists else " (nothing there yet)"
    parts = [
        as_table(
            [
                ("opero", info.opero or "not installed: a copy of the source"),
                ("python", info.python),
                ("location", info.location),
                ("cache folder", f"{info.cache_folder}{exists}"),
                *info.environment.items(),
            ]
        )
    ]
    if info.needs:
        rows = [(name, version or "MISSING") for name, version in info.needs.items()]
        parts += ["\nneeds", as_table(rows, indent="  ")]
    if info.extras:
        rows = [(extra, _installed(extra, found)) for extra, found in info.extras.items()]
        parts += ["\nextras", as_table(rows, indent="  ")]
    return "\n".join(parts)


def _installed(extra: str, found: dict[str, str | None]) -> str:
    if all(found.values()):
        return ", ".join(f"{name} {version}" for name, version in found.items())
    return f"not installed: pip install 'opero[{extra}]'"


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return names of the libraries that opero needs, and of those of each extra."""
    needs: list[str] = []
    extras: dict[str, list[str]] = {}
    try:
        required = metadata.requires("opero") or []
    except metadata.PackageNotFoundError:
        required = []
    for line in required:
        found = _REQUIREMENT.fullmatch(line.strip())
        if found is None:
            continue
        name, extra = found.groups()
        if extra is None:
            needs.append(name)
        elif extra not in _HIDDEN:
            extras.setdefault(extra, []).append(name)
    return sorted(needs, key=str.lower), dict(sorted(extras.items()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
