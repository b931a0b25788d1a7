# this_file: src/opero/cli/program.py
"""The command line's parser, and what errors become."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from opero.errors import OperoError, OperoWarning

__all__ = ["COMMANDS", "main"]

COMMANDS: Final = ("info", "cache", "workflows")
"""Modules of this package, in the order of the help; each has a function `register(commands)`.

It adds parsers to `commands`, which is what `ArgumentParser.add_subparsers` returns, and sets the default `run` of
each to a function that takes the parsed arguments and returns the exit code.
"""

_FAILED: Final = 1
_INTERRUPTED: Final = 130  # as shells say it: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `opero`; None for those of this process.

    Returns:
        The exit code: 0, 1 for an error of opero's, which stands on stderr. Wrong arguments end in
        `SystemExit(2)`, as with every argparse program.
    """
    given = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # What a command cannot do is its error; programs that go on without are warned.
            warnings.simplefilter("ignore", OperoWarning)
            code: int = given.run(given)
        sys.stdout.flush()
    except OperoError as error:
        sys.stderr.write(f"opero: {error}\n")
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough (`opero cache list | head`); the interpreter shall not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opero", description="Looks after what opero has on this machine."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"opero.cli.{name}").register(commands)
    return parser
