# this_file: examples/badday/script.py
"""The little language that says how a route behaves on its bad day.

One line per route; the first line that matches a request plays it:

    PATH  [FIELD=VALUE ...]  [per=FIELD]  [quota=N/SECONDS]  [outage=FROM-TO]  ANSWER ...

`PATH` is exact, or a prefix when it ends in `*`. `FIELD=VALUE` looks at the query string and at
the top level of a JSON body; the field `key` is the caller's API key. `per=FIELD` keeps count and
quota apart for each value of that field. Each call gets the next answer and the last one repeats
for ever; a closing `...` starts again from the first. In an outage, which is between two moments
in seconds since the books were opened, every call gets 503. The answers:

    200  404  500        a status, at once
    200@0.4              the same 0.4 seconds later
    429(0.2)             with a request to come back in 0.2 seconds (Retry-After)
    hang                 no answer, ever
    reset                the connection is torn down
    drop                 the answer breaks off in the middle
    500*2                short for `500 500`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["status", "hang", "reset", "drop"]

_ANSWER = re.compile(
    r"(?P<what>\d{3}|[a-z]+)(?:\((?P<retry_after>[\d.]+)\))?(?:@(?P<delay>[\d.]+))?(?:\*(?P<times>\d+))?"
)
_OUTAGE = re.compile(r"(?P<begin>[\d.]+)-(?P<end>[\d.]+)s?")
_QUOTA = re.compile(r"(?P<limit>\d+)/(?P<period>[\d.]+)s?")


class ScriptError(ValueError):
    """A line of a script that cannot be played; the message quotes it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gets: a status (or worse), perhaps late, perhaps with a request to wait.

    Attributes:
        kind: `"status"` for a proper answer, else the way in which there is none.
        status: The HTTP status; 200 for `drop`, meaningless for `hang` and `reset`.
        delay: Seconds before the answer is sent.
        retry_after: Seconds the caller is asked to stay away, or None.
    """

    kind: Kind = "status"
    status: int = 200
    delay: float = 0.0
    retry_after: float | None = None

    @property
    def outcome(self) -> str:
        """The word under which reports count this answer, such as `"429"` or `"hang"`."""
        return str(self.status) if self.kind == "status" else self.kind


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `limit` calls in any window of `period` seconds."""

    limit: int
    period: float


@dataclass(frozen=True, slots=True)
class Outage:
    """The service is down from one moment to another, in seconds since the books were opened."""

    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Route:
    """One line of a script.

    Attributes:
        text: The line's path and conditions, the route's name in reports.
        path: Exact path, or a prefix followed by `*`.
        where: Fields that a request must have for this route to play it.
        per: Field by which counts and quota are kept apart, or None.
        quota: The hard limit, or None.
        answers: What successive calls get.
        outage: When it is down, or None.
        loops: True when the answers start again, False when the last one repeats.
    """

    text: str
    path: str
    where: tuple[tuple[str, str], ...]
    per: str | None
    quota: Quota | None
    answers: tuple[Answer, ...]
    outage: Outage | None = None
    loops: bool = False

    def matches(self, path: str, fields: Mapping[str, str]) -> bool:
        """Return whether a request for `path` with these fields belongs to this route."""
        if self.path.endswith("*"):
            if not path.startswith(self.path[:-1]):
                return False
        elif path != self.path:
            return False
        return all(fields.get(name, "") == value for name, value in self.where)

    def answer(self, nth: int) -> Answer:
        """Return the answer to the call number `nth`, counted from 0."""
        last = len(self.answers) - 1
        return self.answers[nth % (last + 1) if self.loops else min(nth, last)]


def parse_script(text: str) -> tuple[Route, ...]:
    """Read a script, one route per line; blank lines and `#` comments are skipped.

    Raises:
        ScriptError: A line has no path, no answer, or a word that means nothing.

    Example:
        >>> route, = parse_script("/users  per=id  500*2 200")
        >>> [route.answer(nth).status for nth in range(4)]
        [500, 500, 200, 200]
    """
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return tuple(_parse_route(words) for words in lines if words)


def _parse_route(words: list[str]) -> Route:
    line = " ".join(words)
    path, *rest = words
    if not path.startswith("/"):
        raise ScriptError(f"a route starts with its path, such as /users: {line!r}")
    where: list[tuple[str, str]] = []
    answers: list[Answer] = []
    per: str | None = None
    quota: Quota | None = None
    outage: Outage | None = None
    loops = bool(rest) and rest[-1] == "..."
    for word in rest[:-1] if loops else rest:
        name, equals, value = word.partition("=")
        if not equals:
            answers += _parse_answers(word, line)
        elif name == "per":
            per = value
        elif name == "quota":
            quota = _parse_quota(value, line)
        elif name == "outage":
            outage = _parse_outage(value, line)
        else:
            where.append((name, value))
    if not answers:
        raise ScriptError(f"a route needs an answer, such as 200: {line!r}")
    text = " ".join([path, *(f"{name}={value}" for name, value in where)])
    return Route(text, path, tuple(where), per, quota, tuple(answers), outage, loops)


def _parse_answers(word: str, line: str) -> list[Answer]:
    found = _ANSWER.fullmatch(word)
    if found is None:
        raise ScriptError(f"cannot read the answer {word!r} in {line!r}")
    what = found["what"]
    delay = float(found["delay"] or 0)
    retry_after = None if found["retry_after"] is None else float(found["retry_after"])
    if what.isdigit():
        answer = Answer(status=int(what), delay=delay, retry_after=retry_after)
    else:
        answer = Answer(_kind(what, line), delay=delay, retry_after=retry_after)
    return [answer] * int(found["times"] or 1)


def _kind(word: str, line: str) -> Kind:
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if kind == word != "status":
            return kind
    raise ScriptError(f"an answer is a status, hang, reset or drop, not {word!r}: {line!r}")


def _parse_quota(text: str, line: str) -> Quota:
    found = _QUOTA.fullmatch(text)
    if found is None or not int(found["limit"]) or not float(found["period"]):
        raise ScriptError(f"a quota reads like quota=20/1s, not {text!r}: {line!r}")
    return Quota(int(found["limit"]), float(found["period"]))


def _parse_outage(text: str, line: str) -> Outage:
    found = _OUTAGE.fullmatch(text)
    if found is None or not float(found["begin"]) < float(found["end"]):
        raise ScriptError(f"an outage reads like outage=0.5-2s, not {text!r}: {line!r}")
    return Outage(float(found["begin"]), float(found["end"]))
