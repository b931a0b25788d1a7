# this_file: src/opero/cli/__init__.py
"""Run the command line: `opero COMMAND`, also as `python -m opero COMMAND`.

main        the parser, errors as exit codes, and `opero info`
commands    `opero cache list`, `clear`; `opero workflows list`, `show`, `steps`, `cancel`, ...; tables and JSON
"""

from __future__ import annotations

from opero.cli.main import main

__all__ = ["main"]
