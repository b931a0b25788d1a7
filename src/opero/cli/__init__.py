# this_file: src/opero/cli/__init__.py
"""Run the command line: `opero COMMAND`, also as `python -m opero COMMAND`.

    main        the parser, errors as exit codes, and `opero info`
    cache       `opero cache list`, `opero cache clear`
    workflows   `opero workflows list`, `show`, `steps`, `cancel`, `resume`, `fork`, `signal`, `resolve`
    output      columns of text, JSON

A new command is one module with a function `register(commands)`, and its name in `main.COMMANDS`.
"""

from __future__ import annotations

from opero.cli.main import main

__all__ = ["main"]
