# this_file: src/opero/concurrency/nurse.py
"""The nursery as the map sees it: begin it, ask for lanes, hear of their ends."""

from __future__ import annotations

import functools
import gc
import os
import signal
import socket
import sys
import weakref
from typing import IO, TYPE_CHECKING, Final

from opero.concurrency import nursery
from opero.concurrency.executors.process.pickling import import_paths
from opero.concurrency.wire import Frame, Reader, Writer

if TYPE_CHECKING:
    import subprocess

    from opero.concurrency.executors.process.job_spec import JobSpec
    from opero.concurrency.start import StartMethod

__all__ = ["Nurse", "own_socket"]

_BEGIN: Final = (
    "import sys; a = sys.argv; sys.path[:] = a[3:]; "
    "from opero.concurrency.nursery import begin; begin(int(a[1]), int(a[2]))"
)

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""The sockets of all maps of this process: a child that kept one would keep workers alive that nobody needs."""


def own_socket() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a stream: ours, which does not block and which no fork inherits, and the other's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    _sockets.add(ours)
    return ours, theirs


def _after_fork() -> None:
    for one in list(_sockets):
        one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Nurse:
    """Begins a nursery and talks to it; nothing here waits for it.

    Args:
        method: "fork" of this process, or "forkserver": a fresh interpreter.
        shipment: The job, which a fork inherits.

    Attributes:
        sock: To be watched; `receive` when it is readable.
        inherits: Whether lanes know the job already.
    """

    def __init__(self, method: StartMethod, shipment: JobSpec) -> None:
        self.sock, theirs = own_socket()
        self._reader, self._writer = Reader(self.sock), Writer(self.sock)
        self.inherits: bool = method == "fork"
        self._stderr: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        try:
            with theirs:
                if self.inherits:
                    self._pid = _fork(theirs, shipment)
                else:
                    self._process = self._spawn(theirs)
        except BaseException:
            self.sock.close()
            raise

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        import subprocess
        import tempfile

        # What it says before it is there is read from this file; afterwards it has the program's stderr.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `_forget_stderr`
        stderr = _real_stderr()
        flags: list[str] = vars(subprocess)[
            "_args_from_interpreter_flags"
        ]()  # as multiprocessing does
        try:
            return subprocess.Popen(  # noqa: S603 - this very interpreter
                [
                    *(sys.executable, *flags, "-c", _BEGIN),
                    *(str(theirs.fileno()), str(stderr), *import_paths()),
                ],
                stdin=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(), stderr),
            )
        finally:
            os.close(stderr)

    # --- talking ----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether there is something left to `flush`."""
        return self._writer.pending

    def begin(self, number: int, theirs: socket.socket, slate: int) -> None:
        """Ask for a lane.

        Args:
            number: What it will be called.
            theirs: The lane's end of its stream; closed here when it is sent.
            slate: Descriptor of its slate.
        """
        self._writer.send(Frame(nursery.LANE, number, b"", theirs.detach()))
        self._writer.send(Frame(nursery.LANE, number, b"", os.dup(slate)))

    def kill(self, number: int) -> None:
        """Ask for the death of a lane."""
        self._writer.send(Frame(nursery.KILL, number))

    def flush(self) -> None:
        """Send on what could not be sent before."""
        self._writer.flush()

    def receive(self) -> list[Frame]:
        """Return what it has to say.

        Raises:
            BlockingIOError: Nothing.
            EOFError: It is gone.
        """
        frames = self._reader.receive()
        if self._stderr is not None and any(f.kind == nursery.READY for f in frames):
            self._forget_stderr()
        return frames

    # --- its end ----------------------------------------------------------------------------------

    def said(self) -> str:
        """Return what it wrote to stderr, if it has not come up."""
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()

    def close(self, timeout: float) -> None:
        """Let it kill its lanes and end.

        Args:
            timeout: Seconds after which it is killed itself.
        """
        self._writer.close()
        try:
            self.sock.shutdown(socket.SHUT_WR)
            self.sock.settimeout(max(timeout, 0.05))
            while self.sock.recv(4096):
                pass
        except OSError:
            self._kill()
        self._reader.close()
        self.sock.close()
        self._wait()
        self._forget_stderr()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        elif self._pid:
            try:
                os.kill(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def _wait(self) -> None:
        if self._process is not None:
            self._process.wait()
        elif self._pid:
            try:
                os.waitpid(self._pid, 0)
            except ChildProcessError:
                # The program ignores SIGCHLD, or waits for all its children.
                pass
            self._pid = 0

    def _forget_stderr(self) -> None:
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None


def _fork(theirs: socket.socket, shipment: JobSpec) -> int:
    """Fork this process, which has one thread; return the child's process id."""
    from opero.concurrency.worker import work

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001, S110 - a stream may be None, closed or broken
            pass
    # A Ctrl-C must find the child with its own handlers, or not at all.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        pid = os.fork()
        if not pid:
            # What is garbage here belongs to the parent, and so do its finalizers.
            gc.freeze()
            nursery.tend(theirs, functools.partial(work, shipment=shipment), before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


def _real_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:
        # A program without a terminal may have closed it.
        return os.open(os.devnull, os.O_WRONLY)
