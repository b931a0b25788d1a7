# this_file: examples/badday/ledger.py
"""What the server saw: calls, answers, and the fullest window of every quota.

Time comes in as an argument, in seconds of any monotonic clock, so that tests can count exactly.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from badday.script import Answer, Quota, Route

_LOG_SIZE = 20_000


class SlidingWindow:
    """A hard quota over every half-open window of its period, and its own witness.

    Admitted calls are what the quota limits; `worst` counts all calls that came, admitted or not,
    because that is what a client's own rate limit has to answer for.

    Example:
        >>> window = SlidingWindow(Quota(2, 1.0))
        >>> [window.admit(now) for now in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.0, 0.5, 0.0]
        >>> window.worst, window.rejected
        (3, 1)
    """

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.rejected = 0
        self.worst = 0
        self._arrived: deque[float] = deque()
        self._admitted: deque[float] = deque()

    def admit(self, now: float) -> float:
        """Count a call at `now`; return 0.0 if it is let in, else the seconds until it would be."""
        start = now - self.quota.period
        for calls in (self._arrived, self._admitted):
            while calls and calls[0] <= start:
                calls.popleft()
        self._arrived.append(now)
        self.worst = max(self.worst, len(self._arrived))
        if len(self._admitted) < self.quota.limit:
            self._admitted.append(now)
            return 0.0
        self.rejected += 1
        return self._admitted[0] - start

    @property
    def remaining(self) -> int:
        """Calls that would still be let in at the moment of the last `admit`."""
        return self.quota.limit - len(self._admitted)

    @property
    def empty_in(self) -> float:
        """Seconds from the last `admit` until the whole quota is free again."""
        return self._admitted[-1] + self.quota.period - self._arrived[-1]


@dataclass(frozen=True, slots=True)
class Play:
    """The decision on one call.

    Attributes:
        route: The route that plays the call.
        nth: Which call of its route (and value of `per=`) it is, from 1; 0 if the quota refused or it was down.
        answer: What it gets.
        window: The quota it passed or met, or None.
    """

    route: Route
    nth: int
    answer: Answer
    window: SlidingWindow | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log: seconds since the start, route, value of `per=` (or ""), outcome."""

    at: float
    route: str
    split: str
    outcome: str


class Ledger:
    """The books of a server: decides on each call by its script, and writes down what happened.

    Args:
        routes: The script.
        now: The time at which the books open.
    """

    def __init__(self, routes: tuple[Route, ...], now: float) -> None:
        self.routes = routes
        self.log: deque[Entry] = deque(maxlen=_LOG_SIZE)
        self.unrouted = 0
        self.abandoned = 0
        self._opened = now
        self._played: Counter[tuple[Route, str]] = Counter()
        self._outcomes: dict[Route, Counter[str]] = {route: Counter() for route in routes}
        self._windows: dict[tuple[Route, str], SlidingWindow] = {}
        self._usage: dict[str, Counter[str]] = {}

    def play(self, path: str, fields: Mapping[str, str], now: float) -> Play | None:
        """Decide what a call for `path` gets at `now`; None when no route is meant."""
        for route in self.routes:
            if route.matches(path, fields):
                break
        else:
            self.unrouted += 1
            return None
        split = fields.get(route.per, "") if route.per else ""
        play = self._decide(route, split, now)
        self._outcomes[route][play.answer.outcome] += 1
        self.log.append(Entry(now - self._opened, route.text, split, play.answer.outcome))
        return play

    def _decide(self, route: Route, split: str, now: float) -> Play:
        if route.outage and route.outage.begin <= now - self._opened < route.outage.end:
            return Play(route, 0, Answer(status=503), None)
        window = None
        if route.quota:
            window = self._windows.setdefault((route, split), SlidingWindow(route.quota))
            wait = window.admit(now)
            if wait:
                return Play(route, 0, Answer(status=429, retry_after=wait), window)
        nth = self._played[route, split]
        self._played[route, split] = nth + 1
        return Play(route, nth + 1, route.answer(nth), window)

    def use(self, model: str, usage: Mapping[str, int]) -> None:
        """Book the tokens of one answered chat completion."""
        self._usage.setdefault(model, Counter()).update({"requests": 1, **usage})

    def report(self, now: float) -> dict[str, Any]:
        """Return everything that was counted, as plain JSON types.

        `worst_window` is the largest number of calls, refused ones included, that came within any
        window of the quota's period. With `per=` a quota shows its fullest value.
        """
        return {
            "seconds": round(now - self._opened, 3),
            "calls": sum(counts.total() for counts in self._outcomes.values()),
            "unrouted": self.unrouted,
            "abandoned": self.abandoned,
            "routes": {
                route.text: {"calls": counts.total(), "outcomes": dict(counts)}
                | self._quota_report(route)
                for route, counts in self._outcomes.items()
            },
            "usage": {model: dict(counts) for model, counts in self._usage.items()},
        }

    def _quota_report(self, route: Route) -> dict[str, Any]:
        if route.quota is None:
            return {}
        windows = [window for (owner, _), window in self._windows.items() if owner is route]
        return {
            "quota": asdict(route.quota)
            | {
                "worst_window": max((window.worst for window in windows), default=0),
                "rejected": sum(window.rejected for window in windows),
            }
        }
