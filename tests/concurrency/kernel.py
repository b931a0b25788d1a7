# this_file: tests/concurrency/kernel.py
"""A Jupyter kernel behind standard input and output: a line of JSON in for each cell, one out for what came of it.

A program of its own, because Jupyter's client leaves event loops and sockets unclosed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager


def run(manager: Any, client: Any, text: str, interrupt: str | None) -> dict[str, Any]:
    """Run a cell; press the stop button once it has made the file `interrupt`."""
    found: dict[str, Any] = {"shown": [], "stdout": "", "stderr": "", "error": None}

    def hear(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            found[content["name"]] += content["text"]
        elif message["msg_type"] in ("execute_result", "display_data"):
            found["shown"].append(content["data"])
        elif message["msg_type"] == "error":
            found["error"] = content["ename"]

    button = None
    if interrupt is not None:
        button = threading.Thread(target=press, args=(manager, Path(interrupt)))
        button.start()
    try:
        client.execute_interactive(text, output_hook=hear, timeout=40, allow_stdin=False)
    except TimeoutError:
        found["error"] = "it did not end"
    if button is not None:
        button.join()
    return found


def press(manager: Any, begun: Path) -> None:
    end = time.monotonic() + 100
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.01)
    manager.interrupt_kernel()


def main() -> None:
    """Serve cells until the input ends."""
    manager = KernelManager()
    manager.start_kernel()
    try:
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        for line in sys.stdin:
            sys.stdout.write(json.dumps(run(manager, client, **json.loads(line))) + "\n")
            sys.stdout.flush()
    finally:
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
