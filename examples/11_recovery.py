#!/usr/bin/env python3
# this_file: examples/11_recovery.py
"""A program is killed in the middle of a workflow; the next one goes on where it was, and repeats nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from terminal import use_utf8

from opero.durable import Orchestrator, activity, now, uuid, workflow

FOLDER = Path(os.environ.get("RECOVERY_FOLDER") or tempfile.mkdtemp())
JOURNAL, CALLS = FOLDER / "journal.db", FOLDER / "calls.txt"
DEADLY = os.environ.get("RECOVERY_FOLDER") is not None


def note(text: str) -> None:
    """Write down that a function was really called; a killed program cannot take it back."""
    with CALLS.open("a", encoding="utf-8") as calls:
        calls.write(f"{text}\n")


@activity
def fetch(source: str) -> dict[str, int]:
    """Get some prices."""
    note(f"fetch({source})")
    return {"tea": 3, "cocoa": 5}


@activity
def charge(item: str, cents: int, key: str) -> tuple[str, int]:
    """Charge for one item; the first program dies here, at its second item."""
    note(f"charge({item})")
    if DEADLY and item == "cocoa":
        os.kill(os.getpid(), signal.SIGKILL)
    return (item, cents)


@workflow("shopping")
def shopping(source: str) -> dict[str, object]:
    """What is done here between the calls comes out the same each time; the calls are recorded."""
    prices = fetch(source)
    receipts = [charge(item, cents, str(uuid())) for item, cents in prices.items()]
    return {"receipts": receipts, "at": now()}


def victim() -> None:
    """Run the workflow in this process, which does not live to see its end."""
    with Orchestrator(JOURNAL) as orchestrator:
        orchestrator.wait(orchestrator.invoke_workflow("shopping", "shop", workflow_id="order 7"))


def main() -> None:
    """Start a program that dies, look at what it has left, and go on with it."""
    environment = {**os.environ, "RECOVERY_FOLDER": str(FOLDER)}
    died = subprocess.run([sys.executable, __file__], env=environment, check=False)  # noqa: S603 - this very file
    print(f"the first program was killed: {died.returncode != 0}")
    print(f"it has called: {', '.join(CALLS.read_text(encoding='utf-8').split())}\n")

    orchestrator = Orchestrator(JOURNAL)
    print(f"its workflow is still '{orchestrator.get_workflow_status('order 7')['status']}':")
    for step in orchestrator.steps("order 7"):
        print(f"  step {step['step']}  {step['name']:8} {step['status']}")

    CALLS.write_text("", encoding="utf-8")
    with orchestrator:
        result = orchestrator.result("order 7")
        print(f"\nthe second program has called: {CALLS.read_text(encoding='utf-8').strip()}")
        print(f"result: {result['receipts']}, tuples and all")
        for step in orchestrator.steps("order 7"):
            print(f"  step {step['step']}  {step['name']:8} {step['status']}")


if __name__ == "__main__":
    use_utf8()
    if DEADLY:
        victim()
    else:
        main()
        shutil.rmtree(FOLDER)
