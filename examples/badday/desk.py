# this_file: examples/badday/desk.py
"""From a request to the reply it deserves: script, books and bodies together, still without I/O."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from badday.chat import CHAT_PATH, completion, error_body, refusal
from badday.ledger import Entry, Ledger, Play
from badday.script import Kind, parse_script
from badday.wire import Request, render


@dataclass(frozen=True, slots=True)
class Reply:
    """What a connection has to do: send `data` after `delay` seconds, or worse (see `Kind`).

    `books` are those in which the call stands, None when it was not booked.
    """

    data: bytes
    delay: float = 0.0
    kind: Kind = "status"
    books: Ledger | None = None


class Desk:
    """Answers requests by a script and keeps the books; safe to ask from any thread.

    Args:
        script: What each route answers (see `badday.script`).
        clock: Monotonic seconds; the only time that counts and quotas know.
    """

    def __init__(self, script: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.script = script
        self._clock = clock
        self._lock = threading.Lock()
        self._ledger = Ledger(parse_script(script), clock())
        self._requests = 0

    def reply(self, request: Request) -> Reply:
        """Decide on one request and book it; `/report` and `/reset` are never booked."""
        if request.path == "/report":
            return Reply(render(200, self.report()))
        if request.path == "/reset":
            self.reset()
            return Reply(render(200, {"reset": True}))
        with self._lock:
            return self._play(request)

    def report(self) -> dict[str, Any]:
        """Return what was counted since the start or the last reset (see `Ledger.report`)."""
        with self._lock:
            return self._ledger.report(self._clock())

    def log(self) -> list[Entry]:
        """Return the latest calls, oldest first, with the second at which each came in."""
        with self._lock:
            return list(self._ledger.log)

    def reset(self, script: str | None = None) -> None:
        """Forget all counts; play `script` from now on, or the old one from its start."""
        routes = parse_script(self.script if script is None else script)
        with self._lock:
            self.script = self.script if script is None else script
            self._ledger = Ledger(routes, self._clock())

    def abandon(self, reply: Reply) -> None:
        """Book a caller who left before the answer, in the books from before a reset too."""
        with self._lock:
            if reply.books:
                reply.books.abandoned += 1

    def _play(self, request: Request) -> Reply:
        self._requests += 1
        headers = {"X-Request-Id": f"req-{self._requests}"}
        refused = refusal(request) if request.path == CHAT_PATH else None
        if refused:
            status, message = refused
            return Reply(render(status, error_body(status, request, message), headers))
        play = self._ledger.play(request.path, request.fields, self._clock())
        if play is None:
            return Reply(render(404, error_body(404, request, f"no route for {request.path}")))
        answer = play.answer
        headers |= _quota_headers(play) | _retry_headers(answer.retry_after)
        body = self._body(request, play)
        data = render(answer.status, body, headers)
        return Reply(data, answer.delay, answer.kind, self._ledger)

    def _body(self, request: Request, play: Play) -> dict[str, Any]:
        if play.answer.status >= 400:
            return error_body(play.answer.status, request)
        if request.path != CHAT_PATH:
            return {"path": request.path, "query": request.query, "call": play.nth}
        body = completion(request, self._requests)
        if play.answer.kind == "status":
            self._ledger.use(body["model"], body["usage"])
        return body


def _retry_headers(seconds: float | None) -> dict[str, str]:
    """Name the pause twice, as some APIs do: `Retry-After` knows whole seconds only."""
    if seconds is None:
        return {}
    return {
        "Retry-After": str(math.ceil(seconds)),
        "Retry-After-Ms": str(math.ceil(seconds * 1000)),
    }


def _quota_headers(play: Play) -> dict[str, str]:
    if play.window is None:
        return {}
    return {
        "X-RateLimit-Limit-Requests": str(play.window.quota.limit),
        "X-RateLimit-Remaining-Requests": str(play.window.remaining),
        "X-RateLimit-Reset-Requests": f"{math.ceil(play.window.empty_in * 1000)}ms",
    }
