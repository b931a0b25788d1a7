# this_file: src/opero/concurrency/executors/process/start.py
"""Choose the start method, and begin workers from a fork server that the program keeps between its maps.

The fork server is a small process with one thread. It forks (or, for "spawn", executes) each worker, kills it on
request, reports its exit status, and kills all of them when the program has ended: a worker that computes in C code
cannot notice that by itself. It runs no code of the user's, so nothing of one map is left for the next one.

`multiprocessing`'s own fork server needs a folder for its socket, leaves it behind when the program is killed, and
lets the workers live on. This one is connected by a pair of sockets without a name.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, cast

from opero.errors import WorkerStartError
from opero.utils.fork import reset_after_fork

if TYPE_CHECKING:
    import subprocess


StartMethod = Literal["fork", "forkserver", "spawn"]
"""A fork of the program, a fork of a fresh interpreter, or a fresh interpreter for each worker."""

EXIT_STATUS: Final = struct.Struct("<qq")
"""What the server writes on a worker's sentinel: its process id with 0 when it begins, with its status at its end."""

WorkerMain = Callable[[int, int, int], None]
"""What a worker does with the descriptors of its connection, its own memory and the memory of all workers."""
WarmUp = Callable[[], object] | None
"""What a process that is forked ahead does before it waits, so that what is copied on writing is copied by then."""


# --- the choice -----------------------------------------------------------------------------------

_IMPLICIT: Final = (
    "multiprocessing.pool",
    "multiprocessing.popen_fork",
    "multiprocessing.queues",
    "multiprocessing.synchronize",
    "multiprocessing.managers",
    "concurrent.futures.process",
)
"""Modules whose use sets multiprocessing's default method as if the program had asked for it."""


def choose_method(asked: StartMethod | None) -> StartMethod:
    """Return the start method: the one asked for, else what the program has set in `multiprocessing`.

    A "fork" that is only the platform's default, because some code has used a pool, counts as not set: a fork of a
    program with threads may wait for ever for a lock that one of them held.
    """
    if asked is not None:
        return asked
    context = sys.modules.get("multiprocessing.context")
    default: Any = getattr(context, "_default_context", None)
    method = None if default is None else default.get_start_method(allow_none=True)
    if method in ("spawn", "forkserver"):
        return cast("StartMethod", method)
    if method == "fork" and not any(name in sys.modules for name in _IMPLICIT):
        return "fork"
    # The executable of a frozen program is the program itself, which would run once more.
    return "forkserver" if sys.executable and not getattr(sys, "frozen", False) else "fork"


def import_paths() -> list[str]:
    """Return where modules are looked for, so that another process finds the same ones."""
    return [os.getcwd() if path == "" else path for path in sys.path]  # noqa: PTH109 - pathlib is not loaded for it


# --- descriptors ----------------------------------------------------------------------------------

KILLED: Final = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a process that was killed from outside."""
PAGE: Final = 4096
"""Bytes of the page of memory that says what a worker does; what it has written to stderr stands behind."""

_own: Final[weakref.WeakSet[Channel]] = weakref.WeakSet()
"""Closed in each process that is forked from this one: a copy there would keep workers alive when this process has
closed its own or has ended."""


def shared_file(name: str, size: int = PAGE) -> tuple[int, mmap.mmap]:
    """Return the descriptor of a new file in memory without a name, which nothing outlives, and the file mapped.

    Args:
        name: For the list of mappings of a process.
        size: Bytes; a page where so many are refused (by a limit of files or of addresses).

    Raises:
        OSError: Neither can be had.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(f"opero-{name}", getattr(os, "MFD_CLOEXEC", 1))
    else:
        import tempfile

        with tempfile.TemporaryFile(prefix=f"opero-{name}-") as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, size)
    except (OSError, ValueError) as error:
        os.close(fd)
        if size > PAGE:
            return shared_file(name)
        raise OSError(f"no shared memory: {error}") from error


def read_end(fd: int) -> str:
    """Return the end of the text that stands behind the page of a file."""
    size = os.fstat(fd).st_size
    begin = max(PAGE, size - _LAST_SAID)
    return os.pread(fd, size - begin, begin).decode(errors="replace").strip()


_LAST_SAID: Final = 16_384
_HEAD: Final = struct.Struct("<Q")
_MOST_FDS: Final = 8


class Channel:
    """One end of a connection without a name: messages of bytes, and descriptors with them.

    `multiprocessing.connection` would cost each fresh interpreter a fifth of the time in which it is ready.

    Args:
        sock: The socket; it is closed in processes that are forked from this one.
    """

    def __init__(self, sock: socket.socket) -> None:
        # Not so where the program has set a default timeout.
        sock.setblocking(True)
        # A descriptor that has come from another process is: programs that this one starts would hold the connection.
        sock.set_inheritable(False)
        self._sock = sock
        self.fileno: Callable[[], int] = sock.fileno
        self.close: Callable[[], None] = sock.close
        _own.add(self)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, in one system call if it is short, so that no interrupt leaves a part of it.

        Raises:
            OSError: The other end is closed.
        """
        head = _HEAD.pack(len(message))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        sent = self._sock.sendmsg([head, message], rights)
        if sent < len(head) + len(message):
            self._sock.sendall((head + message)[sent:])

    def receive(self) -> tuple[bytearray, list[int]]:
        """Wait for a message; return it and its descriptors.

        Raises:
            EOFError: The other end is closed.
        """
        head, fds, _, _ = socket.recv_fds(self._sock, _HEAD.size, _MOST_FDS, socket.MSG_WAITALL)
        if len(head) < _HEAD.size:
            raise EOFError
        message = bytearray(_HEAD.unpack(head)[0])
        done = 0
        while done < len(message):
            with memoryview(message)[done:] as left:
                count = self._sock.recv_into(left, 0, socket.MSG_WAITALL)
            if not count:
                raise EOFError
            done += count
        return message, fds

    def peek(self) -> bytes | None:
        """Return the first byte of what has come, none at the end, and None if nothing has come yet."""
        try:
            return self._sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""


# --- the server, from the program -----------------------------------------------------------------


def _surroundings(files: Iterable[str]) -> tuple[Any, ...]:
    """Return what must be as it was when the server began, times of files included; otherwise another one is begun."""
    import resource

    users = os.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups()
    kinds = "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_NOFILE", "RLIMIT_FSIZE"
    limits = [resource.getrlimit(getattr(resource, kind)) for kind in kinds]
    times = dict.fromkeys(files, 0)
    for file in times:
        with suppress(OSError):  # it is gone
            times[file] = os.stat(file).st_mtime_ns  # noqa: PTH116 - faster than a Path
    return os.getpid(), sys.executable, users, limits, times


class ForkServer:
    """A fork server as the program sees it; nothing here waits for it.

    Args:
        worker_main: What workers do, if the server is a fork of this process, for one map. None for a fresh
            interpreter, which imports that and lasts as long as the program.

    Attributes:
        preloaded: Files of the modules that it imports before it forks the next worker.
        surroundings: What was so when it began, and must be so still.
        channel: Takes requests; at its end, the server has ended.
    """

    def __init__(self, worker_main: WorkerMain | None = None) -> None:
        self.preloaded: set[str] = set()
        self.surroundings: tuple[Any, ...] = _surroundings(())
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._forked = 0
        self._output = -1
        ours, theirs = socket.socketpair()
        self.channel: Channel = Channel(ours)
        self._beginner: subprocess.Popen[bytes] | None = None
        # A Ctrl-C must find the child with its own handlers, or not at all.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            try:
                with theirs:
                    if worker_main is not None:
                        self._forked = _fork(theirs, worker_main, mask)
                    else:
                        self._output, _ = shared_file("server")
                        os.lseek(self._output, PAGE, os.SEEK_SET)
                        self._beginner = _begin_interpreter(theirs, self._output)
            finally:
                # Its last user closes it: the pools that have workers of it, or the program at its end.
                self._release = weakref.finalize(self, _release, ours, self._output, self._beginner)
                # Raises the Ctrl-C that has come meanwhile.
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except BaseException:
            self.close()
            raise

    def start(self, fds: Sequence[int], *, fresh: bool = False) -> tuple[int, int]:
        """Begin a worker.

        Args:
            fds: Its connection, its own memory, and the memory of all workers.
            fresh: Whether it is a fresh interpreter ("spawn").

        Returns:
            Its number, for a request to kill it, and the descriptor of its sentinel (see `EXIT_STATUS`).

        Raises:
            OSError: The server is gone, or no descriptor is left.
        """
        number = next(self._numbers)
        sentinel, status = os.pipe()
        mine = [status]
        try:
            for output in (1, 2):
                try:
                    mine.append(os.dup(output))
                except OSError:
                    # The program has closed it.
                    mine.append(os.open(os.devnull, os.O_WRONLY))
            self.request(("start", number, fresh), [*fds, *mine])
        except BaseException:
            os.close(sentinel)
            raise
        finally:
            for fd in mine:
                os.close(fd)
        return number, sentinel

    def request(self, message: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        """Ask it for something: `("kill", number)` ends a worker, whatever it does, if it has not ended already.

        Raises:
            OSError: The server is gone.
        """
        with self._lock:
            self.channel.send(pickle.dumps(message), fds)
        if self._beginner is not None:
            self._beginner.poll()

    def said(self) -> str:
        """Return the end of what the server itself wrote to stderr, and that it never ran if it ended before."""
        if self._beginner is None or not self._release.alive:
            return ""
        said = read_end(self._output)
        if os.pread(self._output, 1, 0) == b"\0" and self._beginner.wait() not in KILLED:
            executable, *_ = cast("list[str]", self._beginner.args)
            said = f"{_wrong(executable, 'it ended before it ran any code')}\n{said}"
        return said.rstrip()

    def close(self) -> None:
        """Let the server kill its workers and end; a fork of this process is waited for."""
        self._release()
        if self._forked:
            # The program may ignore SIGCHLD, or wait for all its children.
            with suppress(ChildProcessError):
                os.waitpid(self._forked, 0)
            self._forked = 0


def _release(sock: socket.socket, output: int, beginner: subprocess.Popen[bytes] | None) -> None:
    sock.close()
    if output >= 0:
        os.close(output)
    if beginner is not None:
        beginner.wait()


class _Shared:
    """The fork server of this program."""

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        self.lock = threading.Lock()
        self.server: ForkServer | None = None
        for one in list(_own):
            one.close()


_shared: Final = _Shared()
reset_after_fork(_shared)


def shared_server(modules: dict[str, str]) -> ForkServer:
    """Return the fork server of this program with these modules preloaded; begin it, or begin it anew.

    It is begun anew if a module that it has imported has changed on disk since, or if the program has another user or
    other limits now. Workers of the old one end with their maps. One that has ended is begun anew when a worker cannot
    begin there.
    """
    with _shared.lock:
        server = _shared.server
        if server is None or server.surroundings != _surroundings(server.preloaded):
            server = _shared.server = ForkServer()
        if new := {name: file for name, file in modules.items() if file not in server.preloaded}:
            server.preloaded.update(new.values())
            server.surroundings = _surroundings(server.preloaded)
            # If it has just ended, a worker that is begun there begins another one.
            with suppress(OSError):
                server.request(("preload", list(new), import_paths()))
        return server


def begin_early(asked: StartMethod | None) -> None:
    """Let the fork server begin while this process imports what it needs to use it."""
    if _shared.server is None and choose_method(asked) != "fork":
        with suppress(OSError, WorkerStartError):  # the first worker says so
            shared_server({})


def forget_server(server: ForkServer) -> None:
    """Begin another fork server for the next worker: this one is gone."""
    with _shared.lock:
        if _shared.server is server:
            _shared.server = None


def _fork(theirs: socket.socket, worker_main: WorkerMain, mask: Any) -> int:
    """Fork this process; the child becomes the server. Return its process id."""
    flush_output()
    pid = os.fork()
    if not pid:
        # What is garbage here belongs to the parent, and so do its finalizers.
        gc.freeze()
        _leave(lambda: _serve(theirs, worker_main, None, mask))
    return pid


def _begin_interpreter(theirs: socket.socket, output: int) -> subprocess.Popen[bytes]:
    """Begin the server in a fresh interpreter. Return the process that begins it and ends."""
    import subprocess

    # What `multiprocessing.set_executable` was given.
    spawn = sys.modules.get("multiprocessing.spawn")
    executable = sys.executable if spawn is None else spawn.get_executable()
    if not executable or getattr(sys, "frozen", False):
        raise WorkerStartError(
            "a fresh interpreter cannot be started from a frozen program, or without sys.executable: "
            'use start_method="fork"',
            None,
        )
    command = [*_interpreter(os.fsdecode(executable), _BEGIN), *import_paths()]
    try:
        return subprocess.Popen(command, stdin=theirs.fileno(), stdout=output, stderr=output)  # noqa: S603 - this very interpreter
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise WorkerStartError(_wrong(executable, error.strerror), None) from error


def _wrong(executable: object, reason: str | None) -> str:
    way_out = 'let it name a Python that has opero, or use start_method="fork"'
    return f"sys.executable is {executable!r} ({reason}): {way_out}"


_BEGIN: Final = (
    "import gc, os, sys; os.pwrite(1, b'1', 0); os.fork() and os._exit(0); gc.disable(); "
    "sys.path[:] = sys.argv[1:]; "
    f"from {__name__} import serve; from {__package__}.worker import warm_up, worker_main; "
    "serve(worker_main, warm_up)"
)
"""It notes that it runs, and looks for no garbage while it imports. The server is no child of the program, whose own
`os.wait()` would wait for it."""

_SPAWN: Final = (
    "import sys; a = sys.argv; sys.path[:] = a[4:]; "
    f"from {__package__}.worker import worker_main; worker_main(*map(int, a[1:4]))"
)


def _interpreter(executable: str, code: str) -> list[str]:
    """Return the command of an interpreter that runs some code, with the flags of this one."""
    import subprocess

    return [executable, *vars(subprocess)["_args_from_interpreter_flags"](), "-c", code]


# --- the server itself ----------------------------------------------------------------------------


_IDLE_MS: Final = 50
"""Milliseconds without a request after which a process is forked ahead while workers have the processors."""
_MOST_AHEAD: Final = 4
"""Most of them when a map is over."""


class _Server:
    """Begins workers; if it outlives its map, some are forked ahead: one at first, as many as a map had at its end."""

    def __init__(self, control: Channel, worker_main: WorkerMain, warm_up: WarmUp) -> None:
        self._control = control
        self._worker_main = worker_main
        self._warm_up = warm_up
        self._workers: dict[int, tuple[int, int]] = {}
        self._ahead: dict[int, Channel] = {}
        self._lasts = warm_up is not None
        self._wanted = 1
        self._idle_ms = _IDLE_MS

    def run(self) -> None:
        """Obey the program until it closes the control socket or has ended; then kill all workers."""
        import select

        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        try:
            while True:
                due = self._lasts and len(self._ahead) < self._wanted
                events = poller.poll(self._idle_ms if due else None)
                if not events:
                    try:
                        self._ahead.update([self._fork()])
                    except OSError:
                        # No process is left: others begin when they are needed.
                        self._lasts = False
                for fd, _ in events:
                    if fd == self._woken:
                        os.read(self._woken, 4096)
                        self._reap()
                    else:
                        self._obey(*self._control.receive())
        except (EOFError, ConnectionError):
            pass
        finally:
            left = [*self._ahead, *[pid for pid, _ in self._workers.values()]]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            for pid in left:
                os.waitpid(pid, 0)

    def _obey(self, data: bytearray, fds: list[int]) -> None:
        message: tuple[Any, ...] = pickle.loads(data)  # noqa: S301 - from the program
        if message[0] == "kill":
            pid, _ = self._workers.get(message[1], (0, 0))
            if pid:
                os.kill(pid, signal.SIGKILL)
            if self._idle_ms:
                # The first of those of a map that is over.
                self._wanted, self._idle_ms = min(len(self._workers), _MOST_AHEAD), 0
        elif message[0] == "preload":
            _preload(*message[1:])
            while self._ahead:
                # It has not imported that, and ends.
                self._ahead.popitem()[1].close()
        else:
            _, number, fresh = message
            self._wanted, self._idle_ms = 1, _IDLE_MS
            *given, status, stdout, stderr = fds
            try:
                pid, channel = self._ahead.popitem() if self._ahead else self._fork(fds)
                with suppress(ConnectionError):  # it was killed: a worker that has ended
                    channel.send(bytes([fresh]), (*given, stdout, stderr))
                channel.close()
            except OSError as error:
                os.write(stderr, f"a worker cannot start: {error}\n".encode())
                os.close(status)
            else:
                self._workers[number] = pid, status
                _report(status, pid, 0)
            for fd in (*given, stdout, stderr):
                os.close(fd)

    def _fork(self, others: Sequence[int] = ()) -> tuple[int, Channel]:
        """Return a process that waits for the descriptors with which it becomes a worker, and the way to it.

        Args:
            others: Descriptors that it has no use for.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            # What is here lives on: a collection in the worker must not touch, and so copy, its pages.
            gc.freeze()
            pid = os.fork()
            if not pid:
                _leave(lambda: self._live(Channel(theirs), [ours.detach(), *others], not others))
        return pid, Channel(ours)

    def _live(self, channel: Channel, others: list[int], ahead: bool) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A sentinel ends with the server: no worker holds it open.
        statuses = [status for _, status in self._workers.values()]
        for fd in (self._woken, self._waker, *others, *statuses):
            os.close(fd)
        if ahead and self._warm_up is not None:
            self._warm_up()
        try:
            fresh, (*given, stdout, stderr) = channel.receive()
        except EOFError:
            return
        channel.close()
        for fd, output in ((stdout, 1), (stderr, 2)):
            os.dup2(fd, output)
            os.close(fd)
        if fresh[0]:
            for fd in given:
                os.set_inheritable(fd, True)
            words = [*_interpreter(sys.executable, _SPAWN), *map(str, given), *sys.path]
            os.execv(sys.executable, words)  # noqa: S606 - this very interpreter
        self._worker_main(*given)

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # there is none
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, code = ended
                if pid in self._ahead:
                    self._ahead.pop(pid).close()
                for number, (known, status) in list(self._workers.items()):
                    if known == pid:
                        del self._workers[number]
                        _report(status, pid, os.waitstatus_to_exitcode(code))
                        os.close(status)


def _report(status: int, pid: int, code: int) -> None:
    with suppress(OSError):  # the map is over
        os.write(status, EXIT_STATUS.pack(pid, code))


def serve(worker_main: WorkerMain, warm_up: WarmUp) -> NoReturn:
    """Become the fork server in a fresh interpreter, whose standard input is the socket to the program.

    Args:
        worker_main: What workers do.
        warm_up: What a process that is forked ahead does before it waits.
    """
    gc.freeze()
    gc.enable()
    _leave(lambda: _serve(socket.socket(fileno=os.dup(0)), worker_main, warm_up, None))


def _serve(control: socket.socket, worker_main: WorkerMain, warm_up: WarmUp, mask: Any) -> None:
    # A Ctrl-C goes to the whole group: the map decides what becomes of its workers. It is handled and not ignored,
    # because programs that a worker starts would inherit that.
    signal.signal(signal.SIGINT, _nothing)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if mask is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    else:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Threads of libraries that were imported end before each fork, by a hook of the library.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the end
    _Server(Channel(control), worker_main, warm_up).run()


def _preload(names: list[str], paths: list[str]) -> None:
    sys.path[:] = paths
    for name in names:
        with suppress(BaseException):  # a worker that needs it meets the same error and reports it
            importlib.import_module(name)


def _leave(last: Callable[[], Any]) -> NoReturn:
    """Run the last function of this process and end it without the exit handlers of the program it is a copy of."""
    code = 1
    try:
        last()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing is left that could handle it
        import traceback

        traceback.print_exc()
    finally:
        flush_output()
        os._exit(code)


def flush_output() -> None:
    """Write out what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a stream may be None, closed or broken
            stream.flush()


def _nothing(*_: object) -> None:
    """Handle a signal whose arrival is all that matters."""
