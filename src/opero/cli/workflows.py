# this_file: src/opero/cli/workflows.py
"""Inspect and control durable workflows in a journal: `opero workflows`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opero.cli.output import as_json, as_table
from opero.errors import ActivityError, JournalError, OperoUsageError

if TYPE_CHECKING:
    from opero.durable.operations import Operations

__all__ = ["register"]

_WIDEST: Final = 60
"""Characters of a value in a table."""
_LIMIT: Final = 50


def register(commands: Any) -> None:
    """Add the commands."""
    parser = commands.add_parser("workflows", help="inspect and control durable workflows")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    listing = verbs.add_parser("list", help="workflows, the youngest first")
    listing.add_argument("--name", help="only those of this name")
    listing.add_argument("--status", help="processing, done, failed, or a state such as sleeping")
    listing.add_argument(
        "--limit", type=int, default=_LIMIT, help=f"most workflows that are listed ({_LIMIT})"
    )
    showing = verbs.add_parser("show", help="one workflow with its result or error")
    steps = verbs.add_parser("steps", help="its steps in order")
    cancel = verbs.add_parser("cancel", help="end it, wherever it runs")
    resume = verbs.add_parser("resume", help="continue after a failure, a cancellation, a block")
    fork = verbs.add_parser("fork", help="start a copy that keeps the steps before one")
    signal = verbs.add_parser("signal", help="send it a signal")
    resolve = verbs.add_parser("resolve", help="record the outcome of a step in doubt")

    for verb in (showing, steps, cancel, resume, fork, signal, resolve):
        verb.add_argument("id", metavar="ID", help="the workflow's id")
    fork.add_argument("step", metavar="STEP", help="first step to run again: its number or path")
    fork.add_argument("--id", dest="new", metavar="ID", help="id of the copy")
    signal.add_argument("name", metavar="NAME", help="what the workflow waits for")
    signal.add_argument("value", metavar="JSON", nargs="?", default="null", help="its value (null)")
    resolve.add_argument("step", metavar="STEP", help="the step's path, as `steps` shows it")
    outcome = resolve.add_mutually_exclusive_group(required=True)
    outcome.add_argument("--result", metavar="JSON", help="it was done, with this result")
    outcome.add_argument("--error", metavar="TEXT", help="it was done, and failed")
    outcome.add_argument("--again", action="store_true", help="it was not done: run it")

    for verb, run in (
        (listing, _list), (showing, _show), (steps, _steps), (cancel, _cancel), (resume, _resume),
        (fork, _fork), (signal, _signal), (resolve, _resolve),
    ):  # fmt: skip
        verb.add_argument("--db", default="opero.db", metavar="FILE", help="the journal (opero.db)")
        verb.set_defaults(run=run)
    for verb in (listing, showing, steps):
        verb.add_argument("--json", action="store_true", help="print JSON")


def _journal(given: argparse.Namespace) -> Operations:
    from opero.durable.operations import Operations
    from opero.durable.sqlite_store import SqliteStore

    # A look must not create a journal.
    if not Path(given.db).exists():
        raise JournalError(f"there is no journal {given.db}: name one with --db FILE.")
    return Operations(SqliteStore(given.db))


# --- inspection ---------------------------------------------------------------------------------------------------


def _list(given: argparse.Namespace) -> int:
    journal = _journal(given)
    found = journal.list_workflows(given.name, given.status, given.limit)
    if given.json:
        print(as_json([_plain(one) for one in found]))
    elif not found:
        print("No workflows.")
    else:
        rows = [
            (
                one["id"],
                one["name"],
                journal.state(one["id"]),
                one["current_activity"] or "",
                _when(one["updated_at"]),
                _short(one["error_message"] or ""),
            )
            for one in found
        ]
        print(as_table([("id", "name", "state", "activity", "updated (UTC)", "error"), *rows]))
    return 0


def _show(given: argparse.Namespace) -> int:
    journal = _journal(given)
    state = journal.state(given.id)
    found = {**(journal.get_workflow_status(given.id) or {}), "state": state}
    if given.json:
        print(as_json(_plain(found)))
    else:
        output = found.pop("output")
        rows = [(key, "" if value is None else value) for key, value in found.items()]
        if found["status"] == "done":
            rows.append(("output", repr(output)))
        print(as_table(rows))
    return 0


def _steps(given: argparse.Namespace) -> int:
    found = _journal(given).steps(given.id)
    if given.json:
        print(as_json([_plain(one) for one in found]))
    elif not found:
        print("No steps.")
    else:
        rows = [
            (
                one["step"],
                one["path"],
                one["name"],
                one["status"],
                one["attempts"],
                _when(one["began_at"]),
                _short(one["error_message"] or repr(one["output"])) if one["ended_at"] else "",
            )
            for one in found
        ]
        head = ("step", "path", "name", "status", "attempts", "began (UTC)", "outcome")
        print(as_table([head, *rows]))
    return 0


# --- control ------------------------------------------------------------------------------------------------


def _cancel(given: argparse.Namespace) -> int:
    if _journal(given).cancel(given.id):
        print(f"{given.id} is being cancelled.")
        return 0
    print(f"{given.id} has ended already.")
    return 1


def _resume(given: argparse.Namespace) -> int:
    if _journal(given).resume(given.id):
        print(f"{given.id} continues as soon as a program runs it.")
        return 0
    print(f"{given.id} is not failed, cancelled, dead or blocked.")
    return 1


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
    print(f"{given.id} continues as soon as a program runs it.")
    return 0


# --- values -------------------------------------------------------------------------------------------------------


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise OperoUsageError(
            f"{text!r} is no JSON ({error}): quote texts, '\"like this\"'."
        ) from None


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Return a dict that JSON can express; other values become their `repr`."""
    return {key: json.loads(json.dumps(value, default=repr)) for key, value in found.items()}


def _when(iso: str) -> str:
    return iso[:19].replace("T", " ")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"
