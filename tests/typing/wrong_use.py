# this_file: tests/typing/wrong_use.py
"""What type checkers must refuse: a line whose `ignore` is not needed is an error. Never run."""

from __future__ import annotations

from typing import TypeVar

from opero import event_bus, opero, operomap
from opero.core import get_retry_decorator
from opero.events import RetryScheduled


@opero
def fetch(x: int, *, y: str = "a") -> list[int]:
    return [x]


@opero(cache_ttl="5m")
async def afetch(x: int) -> str:
    return str(x)


class Client:
    @opero
    def fetch(self, x: int) -> str:
        return ""

    @opero
    @classmethod
    def make(cls, name: str) -> Client:
        return cls()

    @opero
    @staticmethod
    def double(x: int) -> int:
        return 2 * x


class Base:
    @opero
    def decorated(self, x: int) -> str:
        return ""


class Sub(Base):
    @opero
    def decorated(self, x: str) -> str:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return ""


def wrong_arguments(client: Client) -> None:
    fetch()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fetch("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fetch(1, "b")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fetch(1, y=2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fetch(1, z=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fetch.call("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fetch.call()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.fetch()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.fetch("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.fetch(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    client.fetch.call("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Client.fetch(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Client.make()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Client.make(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Client.double("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    client.double("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def wrong_results() -> None:
    text: str = fetch(1)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    number: int = await afetch(1)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    await fetch(1)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    afetch(1).upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    receipt: str = fetch.call(1).value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del text, number, receipt


def wrong_options() -> None:
    opero(retires=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    opero(retries="5")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(cache_ttl=[5])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(retry_on=[OSError])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(retry_on=OSError())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(secret=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(on_event=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    opero(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    opero(fetch, retries=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


T = TypeVar("T")


@opero
def same(x: T) -> T:
    return x


def wrong_attributes() -> None:
    fetch.statistics()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    fetch.cache.purge()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    fetch.stats.reset(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fetch.explain(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    get_retry_decorator()(5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    same()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_events() -> None:
    RetryScheduled(function="f", attempt=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RetryScheduled(function="f", attempt="2", delay=1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RetryScheduled("f", 2, 1)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    RetryScheduled(function="f", attempt=2, delay=1.0).delay = 2.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    event_bus.subscribe(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@operomap
def mapped(x: int) -> str:
    return ""


def wrong_maps() -> None:
    mapped(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    mapped(["a"])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    mapped([1], 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    operomap(worker=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    operomap(mode="threads")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    operomap(on_error=None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
