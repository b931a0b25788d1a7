# this_file: src/opero/cli/__init__.py
"""The command line: `opero COMMAND`, also as `python -m opero COMMAND`.

    program     the parser of it all, and what errors become
    table       columns of text
    info        `opero info`
    cache       `opero cache list`, `opero cache clear`
    workflows   `opero workflows list`, `show`, `steps`, `cancel`, `resume`, `fork`, `signal`, `resolve`

A new command is one module with a function `register(commands)`, and its name in `program.COMMANDS`.
"""

from __future__ import annotations

from opero.cli.program import main

__all__ = ["main"]
