# this_file: tests/durable/test_document.py
"""Programs written for py-orchestrate run with only the import line changed.

`OPERO_DURABLE_DOCUMENT` names one more document whose Python blocks are run: the original, say.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from opero.durable import Orchestrator

PAGE = Path(__file__).parents[2] / "docs" / "py_orchestrate.md"
DOCUMENTS = [PAGE, *map(Path, filter(None, [os.environ.get("OPERO_DURABLE_DOCUMENT")]))]


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page; one that ends with decorators gets a function."""
    text = page.read_text(encoding="utf-8").replace(
        "from opero.durable import", "from py_orchestrate import"
    )
    found = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    made = []
    for block in map(textwrap.dedent, found):
        ends = block.strip().splitlines()[-1].startswith("@")
        made.append(f"{block}def decorated(data): return data\n" if ends else block)
    return made


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module in whose names the blocks run, in a folder of its own, with the activities that one of them imports."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_activities.py").write_text(
        "from opero.durable import activity\n"
        "@activity\ndef fetch_data(source): return {'data': source, 'count': 100}\n"
        "@activity\ndef process_data(data): return {'processed_data': '', 'processed_count': 200}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", made)
    yield made
    sys.modules.pop("my_activities", None)
    for value in list(vars(made).values()):
        if isinstance(value, Orchestrator):
            value.stop()


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.stem)
def test_programs_run_with_only_the_import_line_changed(
    page: Path, module: types.ModuleType
) -> None:
    found = blocks(page)
    assert found
    for number, block in enumerate(found, start=1):
        changed = block.replace("from py_orchestrate import", "from opero.durable import")
        exec(compile(changed, f"{page.stem}, block {number}", "exec"), vars(module))
    for orchestrator in [v for v in vars(module).values() if isinstance(v, Orchestrator)]:
        orchestrator.start()
        for run in orchestrator.list_workflows():
            assert orchestrator.wait(run["id"], timeout=60)["status"] in ("done", "failed")
