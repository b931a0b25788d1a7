# this_file: src/opero/concurrency/nursery.py
"""The nursery, inside: a process with one thread that forks lanes, and takes all of them with it when the map is gone.

Why a process between the map and its lanes:

- It can always fork safely, also in the middle of a map, when the program has threads long since.
- A lane that is busy in the user's code cannot notice that the program was killed. The nursery waits for nothing else.
- It is the lanes' parent, so it is told how each one ended, and can kill one without ever hitting a stranger that got
  its process id.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

from opero.concurrency.wire import Frame, Reader, send_frame

__all__ = ["BORN", "END", "GONE", "KILL", "LANE", "READY", "begin", "tend"]

LANE: Final = b"l"
"""To the nursery: begin lane `number`; with its socket. Its slate follows in a frame of the same kind."""
KILL: Final = b"k"
"""To the nursery: kill lane `number`."""
READY: Final = b"r"
"""From the nursery: it is there."""
BORN: Final = b"b"
"""From the nursery: lane `number` has a process; the body is its id."""
GONE: Final = b"g"
"""From the nursery: lane `number` has ended; the body is its process id and its exit code."""
END: Final = struct.Struct("<qq")

Work = Callable[[socket.socket, int], None]
"""What a lane does with its socket and the descriptor of its slate."""


class _Nursery:
    def __init__(self, control: socket.socket, work: Work) -> None:
        self._control = control
        self._reader = Reader(control)
        self._work = work
        self._lanes: dict[int, int] = {}
        self._socket_of_next: int | None = None

    def run(self) -> None:
        """Do what the map asks until it closes the control socket, or is gone; then kill all lanes."""
        woken, waker = socket.socketpair()
        waker.setblocking(False)
        woken.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        self._own = (self._control, woken, waker)
        send_frame(self._control, Frame(READY))
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            self._selector = selector
            try:
                while True:
                    for key, _ in selector.select():
                        if key.fileobj is woken:
                            woken.recv(4096)
                            self._reap()
                        else:
                            for frame in self._reader.receive():
                                self._obey(frame)
            except (EOFError, OSError):
                # The map is over, or its process is.
                for pid in self._lanes.values():
                    os.kill(pid, signal.SIGKILL)
                for pid in self._lanes.values():
                    os.waitpid(pid, 0)
        for own in self._own:
            own.close()

    def _obey(self, frame: Frame) -> None:
        if frame.kind == KILL:
            pid = self._lanes.get(frame.number)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        elif self._socket_of_next is None:
            self._socket_of_next = frame.fd
        elif frame.fd is not None:
            fd, self._socket_of_next = self._socket_of_next, None
            self._begin(frame.number, fd, frame.fd)

    def _begin(self, number: int, fd: int, slate: int) -> None:
        pid = os.fork()
        if not pid:
            _leave(lambda: self._live(fd, slate))
        os.close(fd)
        os.close(slate)
        self._lanes[number] = pid
        send_frame(self._control, Frame(BORN, number, END.pack(pid, 0)))

    def _live(self, fd: int, slate: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for own in self._own:
            own.close()
        with socket.socket(fileno=fd) as sock:
            self._work(sock, slate)

    def _reap(self) -> None:
        for number, pid in list(self._lanes.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._lanes[number]
                code = os.waitstatus_to_exitcode(status)
                send_frame(self._control, Frame(GONE, number, END.pack(pid, code)))


def tend(control: socket.socket, work: Work, mask: Iterable[int] | None = None) -> NoReturn:
    """Be the nursery from now on; this process ends here.

    Args:
        control: Socket to the map.
        work: What lanes do.
        mask: Signals to be blocked once this process has handlers of its own; None leaves that as it is.
    """
    _leave(lambda: _settle(control, work, mask))


def _settle(control: socket.socket, work: Work, mask: Iterable[int] | None) -> None:
    # A Ctrl-C goes to the whole group: the map decides what becomes of its workers. It is handled and not ignored,
    # because programs that a worker starts would inherit that.
    signal.signal(signal.SIGINT, _nothing)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _close_stdin()
    _Nursery(control, work).run()


def begin(control_fd: int, stderr_fd: int) -> NoReturn:
    """Become the nursery in a fresh interpreter.

    Args:
        control_fd: Descriptor of the socket to the map.
        stderr_fd: Where stderr shall go; until all is imported it goes where the map can read it.
    """
    control = socket.socket(fileno=control_fd)
    control.setblocking(True)
    from opero.concurrency.worker import work

    os.dup2(stderr_fd, 2)
    os.close(stderr_fd)
    tend(control, work)


def _leave(last: Callable[[], Any]) -> NoReturn:
    """Run the last function of this process: what the program it is a copy of wants to do at its end is not done."""
    code = 1
    try:
        last()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - there is nobody left to handle it
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # noqa: BLE001, S110 - the reader may be gone
                pass
        os._exit(code)


def _nothing(*_: object) -> None:
    """Handle a signal whose arrival is all that matters."""


def _close_stdin() -> None:
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor, open until the end
    except OSError:
        pass
