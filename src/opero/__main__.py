# this_file: src/opero/__main__.py
"""`python -m opero`: the command line."""

from __future__ import annotations

import sys

from opero.cli import main

sys.exit(main())
