# this_file: src/opero/cli.py
"""Run the command line: `opero COMMAND`, also as `python -m opero COMMAND`.

`opero info` says what is installed, `opero cache ...` manages disk and redis caches, and `opero workflows ...`
a journal. Errors of opero's become exit codes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opero.caching.handles import clear_cache
from opero.caching.keys.function_keys import namespace_of
from opero.caching.stores.base import open_store, settle
from opero.caching.stores.disk import default_folder
from opero.errors import ActivityError, JournalError, OperoError, OperoUsageError, OperoWarning
from opero.utils.secrets import looks_secret, mask_text, mask_url
from opero.utils.units import format_bytes

if TYPE_CHECKING:
    from opero.caching.stores.base import ByteStore, StoredItem
    from opero.durable.orchestrator import DurableOrchestrator

__all__ = ["main"]

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
    _add_cache_commands(commands)
    _add_workflow_commands(commands)
    return parser


# --- opero info -------------------------------------------------------------------------------------

_HIDDEN: Final = frozenset({"all", "dev", "test"})
"""Extras without a feature of their own."""

_VARIABLES: Final = ("OPERO_CACHE_DIR", "OPERO_REDIS_URL", "OPERO_DISABLE")

_REQUIREMENT: Final = re.compile(r"([A-Za-z0-9][\w.-]*).*?(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")


def _info(given: argparse.Namespace) -> int:
    info = _collect_info()
    print(as_json(info) if given.json else _text(info))
    return 0


def _collect_info() -> dict[str, Any]:
    """Return the facts about this installation; the version of a library that is missing is None."""
    import opero

    folder, extras = default_folder(), _requirements()
    return {
        "opero": _version("opero"),
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {platform.system()})",
        "location": str(Path(opero.__file__).parent),
        "cache_folder": folder,
        "cache_exists": Path(folder).is_dir(),
        "environment": {n: mask_url(os.environ[n]) for n in _VARIABLES if n in os.environ},
        "needs": extras.pop(""),
        "extras": extras,
    }


def _text(info: dict[str, Any]) -> str:
    exists = "" if info["cache_exists"] else " (nothing there yet)"
    facts = [
        ("opero", info["opero"] or "not installed: a copy of the source"),
        ("python", info["python"]),
        ("location", info["location"]),
        ("cache folder", f"{info['cache_folder']}{exists}"),
        *info["environment"].items(),
    ]
    needs = [(name, version or "MISSING") for name, version in info["needs"].items()]
    extras = [(extra, _installed(extra, found)) for extra, found in info["extras"].items()]
    parts = [as_table(facts)]
    for title, rows in (("needs", needs), ("extras", extras)):
        if rows:
            parts += [f"\n{title}", as_table(rows, indent="  ")]
    return "\n".join(parts)


def _installed(extra: str, found: dict[str, str | None]) -> str:
    if all(found.values()):
        return ", ".join(f"{name} {version}" for name, version in found.items())
    return f"not installed: pip install 'opero[{extra}]'"


def _requirements() -> dict[str, dict[str, str | None]]:
    """Return versions of the libraries that each extra brings, and by "" of those that opero needs."""
    found: dict[str, dict[str, str | None]] = {"": {}}
    try:
        required = metadata.requires("opero") or []
    except metadata.PackageNotFoundError:
        required = []
    for line in sorted(required, key=str.lower):
        match = _REQUIREMENT.fullmatch(line.strip())
        if match and match[2] not in _HIDDEN:
            found.setdefault(match[2] or "", {})[match[1]] = _version(match[1])
    return dict(sorted(found.items()))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- opero cache ------------------------------------------------------------------------------------


def _add_cache_commands(commands: Any) -> None:
    """Add `opero cache` and its verbs to a parser."""
    parser = commands.add_parser("cache", help="list and clear disk and redis caches")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    listing = verbs.add_parser("list", help="namespaces with their entries and bytes")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list_cache)

    clearing = verbs.add_parser("clear", help="remove all entries of a namespace")
    clearing.add_argument("namespace", metavar="NAMESPACE", help="the cache_namespace of functions")
    clearing.set_defaults(run=_clear_cache)

    for verb in (listing, clearing):
        verb.add_argument(
            "--backend",
            default="disk",
            help='"disk" (the default), "disk:PATH", "redis" or "redis://HOST:PORT/DB"',
        )


def _namespaces(items: Iterable[StoredItem], *, now: float) -> list[dict[str, Any]]:
    """Count functions, entries and bytes by namespace, in order of their names; expired entries do not count."""
    entries: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    functions: dict[str, set[str]] = {}
    for item in items:
        if item.key.startswith("~") or (item.expires is not None and item.expires <= now):
            continue
        name = namespace_of(item.key)
        entries[name] += 1
        sizes[name] += item.size
        functions.setdefault(name, set()).add(item.key.rpartition(":")[0])
    return [
        {
            "namespace": name,
            "functions": len(functions[name]),
            "entries": entries[name],
            "bytes": sizes[name],
        }
        for name in sorted(entries)
    ]


def _store(backend: str) -> ByteStore | None:
    """Return a store, None for a folder that does not exist: listing must not create it."""
    if backend == "memory":
        raise OperoUsageError(
            "--backend memory: results in memory can be seen by their own program only."
        )
    store = open_store(settle(backend))
    folder = getattr(store, "folder", None)
    return None if folder is not None and not Path(folder).is_dir() else store


def _list_cache(given: argparse.Namespace) -> int:
    store = _store(given.backend)
    found = [] if store is None else _namespaces(store.scan(""), now=time.time())
    columns = {
        **_columns("namespace", "functions", "entries"),
        "size": lambda one: format_bytes(one["bytes"]),
    }
    return _show(given, found, "No entries.", columns)


def _clear_cache(given: argparse.Namespace) -> int:
    removed = 0
    if _store(given.backend) is not None:
        removed = clear_cache(given.namespace, backend=given.backend)
    print(f"Removed {removed} {'entry' if removed == 1 else 'entries'} of {given.namespace!r}.")
    return 0


# --- opero workflows --------------------------------------------------------------------------------

_WIDEST: Final = 60
"""Characters of a value in a table."""
_LIMIT: Final = 50
_CONTINUES: Final = "continues as soon as a program runs it"


def _add_workflow_commands(commands: Any) -> None:
    """Add `opero workflows` and its verbs to a parser."""
    parser = commands.add_parser("workflows", help="inspect and control durable workflows")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str) -> Any:
        made = verbs.add_parser(name, help=about)
        made.add_argument("--db", default="opero.db", metavar="FILE", help="the journal (opero.db)")
        made.set_defaults(run=run)
        return made

    listing = verb("list", _list_workflows, "workflows, the youngest first")
    showing = verb("show", _show_workflow, "one workflow with its result or error")
    steps = verb("steps", _list_steps, "its steps in order")
    cancel = verb("cancel", _cancel, "end it, wherever it runs")
    resume = verb("resume", _resume, "continue after a failure, a cancellation, a block")
    fork = verb("fork", _fork, "start a copy that keeps the steps before one")
    signal = verb("signal", _signal, "send it a signal")
    resolve = verb("resolve", _resolve, "record the outcome of a step in doubt")

    listing.add_argument("--name", help="only those of this name")
    listing.add_argument("--status", help="processing, done, failed, or a state such as sleeping")
    listing.add_argument(
        "--limit", type=int, default=_LIMIT, help=f"most workflows that are listed ({_LIMIT})"
    )
    for parser in (showing, steps, cancel, resume, fork, signal, resolve):
        parser.add_argument("id", metavar="ID", help="the workflow's id")
    fork.add_argument("step", metavar="STEP", help="first step to run again: its number or path")
    fork.add_argument("--id", dest="new", metavar="ID", help="id of the copy")
    signal.add_argument("name", metavar="NAME", help="what the workflow waits for")
    signal.add_argument("value", metavar="JSON", nargs="?", default="null", help="its value (null)")
    resolve.add_argument("step", metavar="STEP", help="the step's path, as `steps` shows it")
    outcome = resolve.add_mutually_exclusive_group(required=True)
    outcome.add_argument("--result", metavar="JSON", help="it was done, with this result")
    outcome.add_argument("--error", metavar="TEXT", help="it was done, and failed")
    outcome.add_argument("--again", action="store_true", help="it was not done: run it")
    for parser in (listing, showing, steps):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _journal(given: argparse.Namespace) -> DurableOrchestrator:
    from opero.durable.orchestrator import DurableOrchestrator

    # A look must not create a journal.
    if not Path(given.db).exists():
        raise JournalError(f"there is no journal {given.db}: name one with --db FILE.")
    return DurableOrchestrator(given.db)


def _list_workflows(given: argparse.Namespace) -> int:
    journal = _journal(given)
    found = journal.list_workflows(given.name, given.status, given.limit)
    columns: Columns = {
        **_columns("id", "name"),
        "state": lambda one: journal.state(one["id"]),
        "activity": lambda one: one["current_activity"] or "",
        "updated (UTC)": lambda one: _when(one["updated_at"]),
        "error": lambda one: _short(one["error_message"] or ""),
    }
    return _show(given, found, "No workflows.", columns)


def _show_workflow(given: argparse.Namespace) -> int:
    journal = _journal(given)
    state = journal.state(given.id)
    found = {**(journal.get_workflow_status(given.id) or {}), "state": state}
    if given.json:
        print(as_json(found))
    else:
        output = found.pop("output")
        rows = [(key, "" if value is None else value) for key, value in found.items()]
        if found["status"] == "done":
            rows.append(("output", repr(output)))
        print(as_table(rows))
    return 0


def _list_steps(given: argparse.Namespace) -> int:
    columns: Columns = {
        **_columns("step", "path", "name", "status", "attempts"),
        "began (UTC)": lambda one: _when(one["began_at"]),
        "outcome": _outcome_of,
    }
    return _show(given, _journal(given).steps(given.id), "No steps.", columns)


def _outcome_of(step: dict[str, Any]) -> str:
    return _short(step["error_message"] or repr(step["output"])) if step["ended_at"] else ""


def _cancel(given: argparse.Namespace) -> int:
    cancelled = _journal(given).cancel(given.id)
    print(f"{given.id} {'is being cancelled' if cancelled else 'has ended already'}.")
    return int(not cancelled)


def _resume(given: argparse.Namespace) -> int:
    resumed = _journal(given).resume(given.id)
    print(f"{given.id} {_CONTINUES if resumed else 'is not failed, cancelled, dead or blocked'}.")
    return int(not resumed)


def _fork(given: argparse.Namespace) -> int:
    step = int(given.step) if given.step.isdecimal() else given.step
    print(_journal(given).fork(given.id, step, workflow_id_new=given.new))
    return 0


def _signal(given: argparse.Namespace) -> int:
    _journal(given).signal(given.id, given.name, _value(given.value))
    print(f"{given.id} has received the signal {given.name!r}.")
    return 0


def _resolve(given: argparse.Namespace) -> int:
    journal = _journal(given)
    if given.again:
        journal.resolve(given.id, given.step, again=True)
    elif given.error is not None:
        journal.resolve(given.id, given.step, error=ActivityError("Error", given.error))
    else:
        journal.resolve(given.id, given.step, result=_value(given.result))
    print(f"{given.id} {_CONTINUES}.")
    return 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OperoUsageError(
            f"{text!r} is no JSON ({error}): quote texts, '\"like this\"'."
        ) from None


def _when(iso: str) -> str:
    return iso[:19].replace("T", " ")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"


# --- output: columns of text or JSON, with secrets masked -------------------------------------------


Columns = Mapping[str, Callable[[dict[str, Any]], object]]
"""The columns of a table: the head of each, and what makes its cell from the facts of a row."""


def _columns(*names: str) -> Columns:
    """Return columns that show facts under their own names."""
    return {name: itemgetter(name) for name in names}


def _show(
    given: argparse.Namespace, facts: Sequence[dict[str, Any]], empty: str, columns: Columns
) -> int:
    """Print facts as JSON if that is asked for, else as a table, or that there are none."""
    if given.json:
        print(as_json(facts))
    elif facts:
        print(as_table([[*columns], *([cell(one) for cell in columns.values()] for one in facts)]))
    else:
        print(empty)
    return 0


_CONTROLS: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys; what is stored must not command it."""


def as_table(rows: Iterable[Sequence[object]], *, indent: str = "") -> str:
    """Return rows as left-aligned columns, two spaces apart, with secrets masked; the last column may be of any length.

    Example:
        >>> print(as_table([("name", "entries"), ("geo", 12)]))
        name  entries
        geo   12
    """
    cells = [[_CONTROLS.sub("?", mask_text(str(cell))) for cell in row] for row in rows]
    columns = max((len(row) for row in cells), default=0)
    widths = [
        max((len(row[n]) for row in cells if n < len(row)), default=0) for n in range(columns)
    ]
    lines = (
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def as_json(facts: object) -> str:
    """Return facts as indented JSON, with secrets masked; what JSON cannot express is shown by its `repr`."""
    plain = json.loads(json.dumps(facts, default=repr))
    return json.dumps(_masked(plain), indent=2, ensure_ascii=False)


def _masked(facts: Any, name: str = "") -> Any:
    if isinstance(facts, str):
        # Of opero's own variables no more than the password of a URL is secret.
        return "***" if looks_secret(name) and name not in _VARIABLES else mask_text(facts)
    if isinstance(facts, dict):
        return {key: _masked(value, str(key)) for key, value in facts.items()}
    if isinstance(facts, list):
        return [_masked(item, name) for item in facts]
    return facts
