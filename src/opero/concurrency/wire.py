# this_file: src/opero/concurrency/wire.py
"""Frames between a map and its workers: a short header, a body, and at most one descriptor.

Each lane has a stream of its own, so a worker that is killed in the middle of a frame spoils nobody else's, and no lock
is shared that could die with its holder.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from typing import Final, NamedTuple

__all__ = ["Frame", "Reader", "Writer", "send_frame"]

_HEADER: Final = struct.Struct("<c?xxxxxxQQ")
_AT_ONCE: Final = 1 << 18
"""Bytes asked for at a time."""
_FDS: Final = 16
"""Descriptors for which there is room in one reading; each frame has one at most."""


class Frame(NamedTuple):
    """A message.

    Attributes:
        kind: What it is, one letter.
        number: What it is about, a chunk or a process.
        body: Its content.
        fd: A descriptor that belongs to the receiver now.
    """

    kind: bytes
    number: int = 0
    body: bytes | memoryview = b""
    fd: int | None = None


class Reader:
    """Takes frames off a socket as their bytes come in, whatever the pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._bytes = bytearray()
        self._fds: deque[int] = deque()

    def receive(self) -> list[Frame]:
        """Read once and return the frames that are complete now.

        Raises:
            BlockingIOError: The socket does not block and has nothing.
            EOFError: The other side is gone.
        """
        # A large body comes in pieces as large as the socket allows.
        data = self._read()
        if not data:
            raise EOFError
        self._bytes += data
        return list(self._complete())

    def _read(self) -> bytes:
        if not hasattr(self._sock, "recvmsg"):
            return self._sock.recv(_AT_ONCE)
        space = socket.CMSG_SPACE(4 * _FDS)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        data, extras, _, _ = self._sock.recvmsg(_AT_ONCE, space, flags)
        for level, kind, packed in extras:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
                self._fds.extend(fds)
        return data

    def _complete(self) -> list[Frame]:
        frames = []
        begin, have = 0, len(self._bytes)
        while have - begin >= _HEADER.size:
            kind, with_fd, number, length = _HEADER.unpack_from(self._bytes, begin)
            end = begin + _HEADER.size + length
            if have < end:
                break
            with memoryview(self._bytes) as view:
                body = bytes(view[begin + _HEADER.size : end])
            frames.append(Frame(kind, number, body, self._fds.popleft() if with_fd else None))
            begin = end
        if begin:
            del self._bytes[:begin]
        return frames

    def close(self) -> None:
        """Close the descriptors of frames that were never complete."""
        while self._fds:
            os.close(self._fds.popleft())


class Writer:
    """Puts frames on a socket that does not block, as far as there is room, and keeps the rest.

    Nobody ever waits for the other side to read: two processes that send each other more than a socket holds cannot
    block each other.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: deque[tuple[memoryview, int | None]] = deque()

    @property
    def pending(self) -> bool:
        """Whether something could not be sent yet."""
        return bool(self._waiting)

    def send(self, frame: Frame) -> None:
        """Send a frame as far as that is possible now; its descriptor is closed here once it is sent."""
        head = _HEADER.pack(frame.kind, frame.fd is not None, frame.number, len(frame.body))
        if len(frame.body) < _AT_ONCE:
            self._waiting.append((memoryview(head + bytes(frame.body)), frame.fd))
        else:
            self._waiting.append((memoryview(head), frame.fd))
            self._waiting.append((memoryview(frame.body), None))
        self.flush()

    def flush(self) -> None:
        """Send on what could not be sent before.

        Raises:
            OSError: The other side is gone.
        """
        while self._waiting:
            data, fd = self._waiting[0]
            try:
                sent = _send(self._sock, data, fd)
            except BlockingIOError:
                return
            if fd is not None:
                os.close(fd)
            if sent == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = data[sent:], None

    def close(self) -> None:
        """Forget what was not sent and close its descriptors."""
        for _, fd in self._waiting:
            if fd is not None:
                os.close(fd)
        self._waiting.clear()


def send_frame(sock: socket.socket, frame: Frame) -> None:
    """Send a whole frame through a socket that blocks, and close its descriptor."""
    head = _HEADER.pack(frame.kind, frame.fd is not None, frame.number, len(frame.body))
    try:
        if frame.fd is None and len(frame.body) < _AT_ONCE:
            sock.sendall(head + frame.body)
            return
        sent = _send(sock, memoryview(head), frame.fd)
    finally:
        if frame.fd is not None:
            os.close(frame.fd)
    if sent < len(head):
        sock.sendall(head[sent:])
    sock.sendall(frame.body)


def _send(sock: socket.socket, data: memoryview, fd: int | None) -> int:
    if fd is None:
        return sock.send(data)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    return sock.sendmsg([data], [rights])
