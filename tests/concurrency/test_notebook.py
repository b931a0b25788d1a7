# this_file: tests/concurrency/test_notebook.py
"""Maps in the cells of a real Jupyter kernel: every mode, what is shown, and the stop button."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if sys.platform != "linux":
    pytest.skip("looks at processes in /proc", allow_module_level=True)

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.timeout(120)


class Cell(NamedTuple):
    """What came of a cell."""

    shown: list[dict[str, Any]]
    stdout: str
    stderr: str
    error: str | None


class Notebook:
    """A kernel in which cells run one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        places = os.pathsep.join([str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
        away = {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
        self._host = subprocess.Popen(
            [sys.executable, HERE / "kernel.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env={**os.environ, **away, "PYTHONPATH": places},
        )

    def run(self, text: str, interrupt: Path | None = None) -> Cell:
        """Run a cell; press the stop button once it has made this file."""
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        asked = {"text": textwrap.dedent(text), "interrupt": interrupt and str(interrupt)}
        self._host.stdin.write(json.dumps(asked) + "\n")
        self._host.stdin.flush()
        return Cell(**json.loads(self._host.stdout.readline()))

    def ran(self, text: str) -> Cell:
        """Run a cell that must not fail."""
        cell = self.run(text)
        assert cell.error is None, cell
        return cell

    def pid(self) -> int:
        return int(self.ran("import os; print(os.getpid())").stdout)

    def workers(self) -> list[str]:
        """Return the processes that the kernel has begun and that are there still."""
        tasks = Path(f"/proc/{self.pid()}/task").iterdir()
        return [child for task in tasks for child in (task / "children").read_text().split()]

    def close(self) -> None:
        self._host.communicate(timeout=100)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    notebook = Notebook(tmp_path_factory.mktemp("notebook"))
    try:
        notebook.ran(
            """
            import asyncio, os, time
            from pathlib import Path
            from opero import operomap

            async def tick():
                # The kernel notices its stop button when its event loop wakes (ipython/ipykernel#881).
                while True:
                    await asyncio.sleep(0.05)

            ticking = asyncio.create_task(tick())
            """
        )
        yield notebook
    finally:
        notebook.close()


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_a_function_of_a_cell_is_mapped_as_it_is_now(notebook: Notebook, mode: str) -> None:
    notebook.ran(
        f"""
        @operomap(mode="{mode}", workers=2, cache=False)
        def times(x):
            return x * factor
        """
    )
    assert notebook.ran("factor = 2\ntimes([1, 2])").shown[-1]["text/plain"] == "[2, 4]"
    assert notebook.ran("factor = 5\ntimes([1, 2])").shown[-1]["text/plain"] == "[5, 10]"
    assert notebook.workers() == []


@pytest.mark.parametrize("mode", ["async", "async_process", "process"])
def test_coroutines_are_awaited_in_a_cell(notebook: Notebook, mode: str) -> None:
    cell = notebook.ran(
        f"""
        @operomap(mode="{mode}", workers=2, cache=False)
        async def later(x):
            await asyncio.sleep(0.001)
            return x + 1, os.getpid() == {notebook.pid()}
        found = await later(range(3))
        [value for value, _ in found]
        """
    )
    assert cell.shown[-1]["text/plain"] == "[1, 2, 3]"
    assert notebook.workers() == []


def test_a_stream_is_consumed_in_another_cell(notebook: Notebook) -> None:
    notebook.ran(
        """
        @operomap(mode="process", workers=2, cache=False)
        def negative(x):
            return -x
        stream = negative.stream(iter(range(10_000)))
        first = next(stream)
        """
    )
    cell = notebook.ran("print(first, next(stream), next(stream)); stream.close()")
    assert cell.stdout == "0 -1 -2\n"
    assert notebook.workers() == []


def test_a_result_shows_itself_with_its_failures(notebook: Notebook) -> None:
    cell = notebook.ran(
        """
        @operomap(mode="process", workers=2, cache=False, retries=0)
        def risky(x):
            if x == 2:
                raise ValueError("<no>")
            return x
        risky.map(range(4))
        """
    )
    (shown,) = [data for data in cell.shown if "text/html" in data and "MapResult" in str(data)]
    assert "<td>2</td><td>ValueError</td><td>&lt;no&gt;</td>" in shown["text/html"]
    assert shown["text/plain"].startswith("<MapResult complete: 3 ")


BAR = """
    from opero import operomap
    @operomap(mode="thread", workers=2, cache=False, retries=0, on_error="skip")
    def shown(x):
        return 1 / x
    _ = shown(range(50))
"""


def test_progress_is_a_widget(notebook: Notebook) -> None:
    cell = notebook.ran(BAR)
    widgets = [data for data in cell.shown if "application/vnd.jupyter.widget-view+json" in data]
    assert len(widgets) == 1
    assert cell.stderr == ""
    box = widgets[0]["application/vnd.jupyter.widget-view+json"]["model_id"]
    output = notebook.ran(
        f"""
        from ipywidgets.widgets.widget import _instances
        print(*[child.value for child in _instances[{box!r}].children])
        """
    ).stdout
    assert "shown: 100%" in output.replace("\u2007", " ")
    assert "50/50" in output
    assert "failed=1" in output


def test_progress_is_a_line_of_text_without_widgets(tmp_path: Path) -> None:
    notebook = Notebook(tmp_path)
    try:
        cell = notebook.ran("import sys; sys.modules['ipywidgets'] = None\n" + textwrap.dedent(BAR))
    finally:
        notebook.close()
    last = cell.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("shown: 100%")
    assert "50/50" in last
    assert "failed=1" in last
    assert "\x1b[A" not in cell.stderr


@pytest.mark.parametrize("mode", ["process", "thread", "async", "async_process"])
def test_the_stop_button_ends_a_map_and_its_workers(notebook: Notebook, mode: str) -> None:
    begun = notebook.folder / f"begun-{mode}"
    colour, pause, wait = (
        ("async ", "await asyncio", "await ") if "async" in mode else ("", "time", "")
    )
    cell = notebook.run(
        f"""
        @operomap(mode="{mode}", workers=2, cache=False)
        {colour}def long(x):
            Path({str(begun)!r}).touch()
            {pause}.sleep({0.5 if mode == "thread" else 60})
        {wait}long(range(400))
        """,
        interrupt=begun,
    )
    assert cell.error in ("KeyboardInterrupt", "CancelledError")
    assert notebook.workers() == []
    assert (
        notebook.ran("operomap(mode='process', cache=False)(abs)([-1])").shown[-1]["text/plain"]
        == "[1]"
    )
