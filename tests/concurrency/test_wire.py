# this_file: tests/concurrency/test_wire.py
from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.concurrency.wire import Frame, Reader, Writer, send_frame


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


frames = st.builds(
    Frame,
    kind=st.binary(min_size=1, max_size=1),
    number=st.integers(0, 2**64 - 1),
    body=st.binary(max_size=300),
    fd=st.none(),
)


@given(sent=st.lists(frames, max_size=10), sizes=st.lists(st.integers(1, 50), min_size=1))
def test_frames_arrive_whole_whatever_the_pieces(sent: list[Frame], sizes: list[int]) -> None:
    one, other = socket.socketpair()
    with one, other:
        for frame in sent:
            send_frame(one, frame)
        one.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: other.recv(4096), b""))
    one, other = socket.socketpair()
    found: list[Frame] = []
    with one, other:
        reader = Reader(other)
        place = turn = 0
        while place < len(data):
            size = sizes[turn % len(sizes)]
            one.sendall(data[place : place + size])
            found += reader.receive()
            place, turn = place + size, turn + 1
    assert found == sent


def test_nobody_waits_for_the_other_side_to_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    one, other = ends
    one.setblocking(False)
    writer = Writer(one)
    writer.send(Frame(b"a", 1, bytes(5_000_000)))
    writer.send(Frame(b"b", 2, b"after"))
    assert writer.pending
    reader, found = Reader(other), []
    while len(found) < 2:
        found += reader.receive()
        writer.flush()
    assert not writer.pending
    assert [(f.kind, len(f.body)) for f in found] == [(b"a", 5_000_000), (b"b", 5)]


@pytest.mark.skipif(os.name == "nt", reason="Windows passes no descriptors")
def test_descriptors_arrive_with_their_frames(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    found: list[Frame] = []
    reader = Reader(other)

    def read() -> None:
        while len(found) < 30:
            found.extend(reader.receive())

    thread = threading.Thread(target=read)
    thread.start()
    for n in range(30):
        fd = None
        if n % 3:
            fd, write = os.pipe()
            os.write(write, bytes([n]))
            os.close(write)
        send_frame(one, Frame(b"x", n, bytes(n * 10_000), fd))
    thread.join()
    for frame in found:
        assert (frame.fd is not None) == bool(frame.number % 3)
        if frame.fd is not None:
            assert os.read(frame.fd, 9) == bytes([frame.number])
            assert not os.get_inheritable(frame.fd)
            os.close(frame.fd)


@pytest.mark.skipif(os.name == "nt", reason="Windows passes no descriptors")
def test_descriptors_of_frames_that_never_came_are_closed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    one, _ = ends
    one.setblocking(False)
    writer = Writer(one)
    while not writer.pending:
        writer.send(Frame(b"x", 1, bytes(100_000)))
    read, write = os.pipe()
    writer.send(Frame(b"x", 1, b"some", read))
    writer.close()
    with pytest.raises(BrokenPipeError):
        os.write(write, b"nobody reads")
    os.close(write)


def test_the_end_of_the_other_side_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    one.close()
    with pytest.raises(EOFError):
        Reader(other).receive()
