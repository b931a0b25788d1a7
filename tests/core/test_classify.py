# this_file: tests/core/test_classify.py
"""Classified failures: what is retried by default, by "transient", and what ends a fallback value."""

from __future__ import annotations

import asyncio
import http.client
import socket
import sqlite3
import ssl
import urllib.error
from email.message import Message
from typing import Any

import pytest
from tests.tables import rows

from opero import add_classifier, opero
from opero.core.classify import Verdict, classify, may_be_billed
from opero.core.fallback import EXHAUSTED_SECONDS
from opero.errors import CallTimeoutError, OperoUsageError
from opero.testing import FakeClock, capture_events, fake_clock

pytestmark = pytest.mark.internal

FINAL = (
    *(400, 401, 403, 404, 405, 406, 410, 411, 412, 413, 414, 415, 416, 417),
    *(421, 422, 426, 428, 431, 451, 501, 505),
)
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 507, 529)


class Response:
    def __init__(self, status: int, **headers: str) -> None:
        self.status_code = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class AnswerError(Exception):
    """An error with a response, as those of httpx and requests."""

    def __init__(self, status: int, body: object = None, **headers: str) -> None:
        super().__init__(f"HTTP {status}")
        self.response = Response(status, **headers)
        self.body = body


def error_with(**attributes: object) -> Exception:
    made = Exception("answered")
    vars(made).update(attributes)
    return made


def foreign(name: str, module: str, base: type[Exception] = Exception) -> type[Exception]:
    return type(name, (base,), {"__module__": module})


def caused_by(cause: Exception) -> Exception:
    made = RuntimeError("wrapped")
    made.__cause__ = cause
    return made


@rows("status", FINAL)
def test_final_statuses(status: int) -> None:
    assert classify(AnswerError(status)) == Verdict("final", f"status {status}")


@pytest.mark.parametrize("status", TRANSIENT)
def test_transient_statuses(status: int) -> None:
    assert classify(AnswerError(status)).kind == "transient"


@pytest.mark.parametrize("status", [200, 302, 407, 418, 423, 0, 12345])
def test_other_statuses_are_unknown(status: int) -> None:
    assert classify(AnswerError(status)).kind == "unknown"


@pytest.mark.parametrize("name", ["status_code", "status", "http_status", "code"])
def test_the_status_may_be_on_the_error_itself(name: str) -> None:
    assert classify(error_with(**{name: 404})).kind == "final"


def test_a_cause_is_read_where_the_error_says_nothing() -> None:
    assert classify(caused_by(caused_by(AnswerError(404)))).kind == "final"
    assert classify(caused_by(ConnectionResetError())).kind == "transient"


def test_one_final_member_makes_a_group_final() -> None:
    passing, final = ConnectionError(), AnswerError(401)
    assert classify(ExceptionGroup("g", [passing, caused_by(final)])).kind == "final"
    assert classify(ExceptionGroup("g", [ExceptionGroup("h", [final]), passing])).kind == "final"
    assert classify(ExceptionGroup("g", [passing, AnswerError(503)])).kind == "transient"
    assert classify(ExceptionGroup("g", [passing, ValueError()])).kind == "unknown"


@pytest.mark.parametrize(
    "error",
    [
        AnswerError(402),
        AnswerError(429, {"error": {"code": "insufficient_quota"}}),
        AnswerError(429, {"code": "insufficient_quota"}),
        AnswerError(403, {"error": {"errors": [], "type": "billing_error"}}),
        error_with(code="insufficient_quota", status_code=429),
        caused_by(AnswerError(402)),
    ],
)
def test_exhausted_budgets(error: Exception) -> None:
    assert classify(error).kind == "exhausted"


@pytest.mark.parametrize(
    "code", ["ThrottlingException", "ProvisionedThroughputExceededException", "SlowDown"]
)
def test_codes_of_botocore_come_before_its_status(code: str) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    assert classify(error_with(response=answer)).kind == "transient"
    answer["Error"]["Code"] = "ValidationException"
    assert classify(error_with(response=answer)).kind == "final"


def test_a_403_that_limits_the_rate_is_transient() -> None:
    assert classify(AnswerError(403, retry_after="5")).kind == "transient"
    assert classify(AnswerError(403, x_ratelimit_remaining="0")).kind == "transient"
    assert classify(AnswerError(403, x_ratelimit_remaining="7")).kind == "final"
    reasons = [{"reason": "userRateLimitExceeded"}]
    assert classify(error_with(status_code=403, error_details=reasons)).kind == "transient"


def test_a_service_may_say_itself_whether_to_retry() -> None:
    assert classify(AnswerError(500, x_should_retry="false")).kind == "final"
    assert classify(AnswerError(400, x_should_retry="true")).kind == "transient"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("UNAVAILABLE", "transient"), ("NOT_FOUND", "final"), ("CANCELLED", "unknown")],
)
def test_codes_of_grpc(name: str, kind: str) -> None:
    error = foreign("RpcError", "grpc")()
    code = type("Code", (), {"name": name})()
    vars(error)["code"] = lambda: code
    assert classify(error).kind == kind
    assert may_be_billed(error) is (kind == "unknown")


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("08006", "transient"),
        ("40001", "transient"),
        ("40P01", "transient"),
        ("55P03", "transient"),
        ("57P01", "transient"),
        ("23505", "final"),
        ("42P01", "final"),
        ("28P01", "final"),
        ("XX000", "unknown"),
    ],
)
@pytest.mark.parametrize("name", ["sqlstate", "pgcode"])
def test_states_of_sql(state: str, kind: str, name: str) -> None:
    assert classify(error_with(**{name: state})).kind == kind


def test_errors_of_database_drivers() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (x integer unique)")
    connection.execute("insert into t values (1)")
    with pytest.raises(sqlite3.IntegrityError) as twice:
        connection.execute("insert into t values (1)")
    assert classify(twice.value).kind == "final"
    busy = sqlite3.OperationalError("database is locked")
    vars(busy)["sqlite_errorcode"] = 5
    assert classify(busy).kind == "transient"
    connection.close()
    mysql = foreign("OperationalError", "pymysql.err")
    assert classify(mysql(1213, "deadlock")).kind == "transient"
    assert classify(mysql(1045, "denied")).kind == "final"
    assert classify(foreign("IntegrityError", "sqlalchemy.exc")()).kind == "final"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (foreign("OperationalError", "psycopg")("connection refused"), "transient"),
        (foreign("PoolTimeout", "psycopg_pool", foreign("OperationalError", "psycopg"))(), "transient"),
        (foreign("OperationalError", "psycopg2")("could not connect"), "transient"),
        (foreign("OperationalError", "pyodbc")("08S01", "link failure"), "transient"),
        (foreign("ProgrammingError", "pyodbc")("42S02", "no such table"), "final"),
        (foreign("DatabaseError", "oracledb")(error_with(isrecoverable=True)), "transient"),
        (foreign("TimeoutError", "sqlalchemy.exc")("QueuePool limit"), "transient"),
    ],
)  # fmt: skip
def test_drivers_that_name_no_state(error: Exception, kind: str) -> None:
    assert classify(error).kind == kind


@pytest.mark.parametrize("name", ["httpx.ConnectError", "requests.exceptions.SSLError"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_client_whose_server_has_no_valid_certificate_is_answered_for_good(
    name: str, depth: int
) -> None:
    error: Exception = ssl.SSLCertVerificationError(1, "certificate verify failed")
    for _ in range(depth):
        module, _, kind = name.rpartition(".")
        base = "TransportError" if module == "httpx" else "ConnectionError"
        outer = foreign(kind, module, foreign(base, module))()
        outer.__context__ = error
        error = outer
    assert classify(error).kind == "final"
    assert not may_be_billed(error)


@pytest.mark.parametrize(
    "kind", ["overloaded_error", "api_error", "rate_limit_error", "server_error"]
)
def test_a_stream_that_breaks_off_with_an_error_of_the_service_is_worth_another_call(
    kind: str,
) -> None:
    assert classify(error_with(status_code=200, body={"error": {"type": kind}})).kind == "transient"


REDIS_CONNECTION = foreign("ConnectionError", "redis.exceptions")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (foreign("ConnectTimeout", "httpx", foreign("TransportError", "httpx"))(), "transient"),
        (foreign("UnsupportedProtocol", "httpx", foreign("TransportError", "httpx"))(), "final"),
        (foreign("ConnectionError", "requests.exceptions", OSError)(), "transient"),
        (foreign("ServerDisconnectedError", "aiohttp", foreign("ClientConnectionError", "aiohttp"))(), "transient"),
        (foreign("APITimeoutError", "openai", foreign("APIConnectionError", "openai"))(), "transient"),
        (foreign("APIConnectionError", "anthropic")(), "transient"),
        (foreign("ConnectionError", "botocore.exceptions")(), "transient"),
        (REDIS_CONNECTION(), "transient"),
        (foreign("AuthenticationError", "redis.exceptions", REDIS_CONNECTION)(), "final"),
        (foreign("WatchError", "redis.exceptions")(), "transient"),
        (foreign("InvalidHeader", "requests.exceptions")(), "final"),
        (foreign("LocationParseError", "urllib3.exceptions", foreign("LocationValueError", "urllib3"))(), "final"),
        (foreign("NoRegionError", "botocore.exceptions")(), "final"),
        (foreign("DefaultCredentialsError", "google.auth.exceptions")(), "final"),
        (foreign("TransportError", "google.auth.exceptions")(), "transient"),
        (foreign("ConnectionError", "app")(), "unknown"),
    ],
)  # fmt: skip
def test_classes_of_client_libraries(error: Exception, kind: str) -> None:
    assert classify(error).kind == kind


def test_a_broken_answer_to_which_aiohttp_gives_a_status_is_worth_another_call() -> None:
    error = error_with(status=400)
    error.__cause__ = foreign("BadStatusLine", "aiohttp.http_exceptions")()
    assert classify(error).kind == "transient"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(), "transient"),
        (TimeoutError(), "transient"),
        (CallTimeoutError("f", 1.0), "transient"),
        (OSError(113, "no route to host"), "transient"),
        (socket.gaierror(-3, "try again"), "transient"),
        (urllib.error.URLError(ConnectionResetError()), "transient"),
        (urllib.error.URLError(ssl.SSLCertVerificationError()), "final"),
        (urllib.error.HTTPError("http://x", 404, "gone", Message(), None), "final"),
        (ssl.SSLEOFError(8, "EOF occurred"), "transient"),
        (asyncio.IncompleteReadError(b"", 1), "transient"),
        (http.client.InvalidURL(), "final"),
        (FileNotFoundError(), "unknown"),
        (ValueError(), "unknown"),
    ],
)
def test_errors_of_python_itself(error: Exception, kind: str) -> None:
    assert classify(error).kind == kind


class HostileError(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


def test_hostile_and_circular_errors_are_unknown() -> None:
    assert classify(HostileError()).kind == "unknown"
    one, two = caused_by(ValueError()), RuntimeError()
    one.__cause__, two.__cause__ = two, one
    assert classify(one).kind == "unknown"


def test_users_add_classifiers() -> None:
    def mine(error: BaseException) -> Any:
        return "final" if isinstance(error, KeyError) else None

    def broken(error: BaseException) -> Any:
        raise RuntimeError

    removers = [add_classifier(broken), add_classifier(mine)]
    try:
        assert classify(KeyError()).kind == "final"
        assert classify(LookupError()).kind == "unknown"
    finally:
        for remove in removers:
            remove()
    assert classify(KeyError()).kind == "unknown"


# --- what the options make of it ------------------------------------------------------------------


def calls_of(error: Exception, **options: Any) -> tuple[int, str]:
    calls: list[int] = []

    @opero(cache=False, min_delay=0, **options)
    def ask() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        ask()
    return len(calls), "\n".join(getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize(
    ("error", "default", "transient"),
    [
        (AnswerError(404), 1, 1),
        (AnswerError(402), 1, 1),
        (AnswerError(503), 4, 4),
        (ConnectionError(), 4, 4),
        (ValueError(), 4, 1),
        (ExceptionGroup("g", [AnswerError(401)]), 1, 1),
    ],
)
def test_calls_made(error: Exception, default: int, transient: int) -> None:
    assert calls_of(error)[0] == default
    assert calls_of(error, retry_on="transient")[0] == transient
    assert calls_of(error, retry_on=Exception)[0] == 4
    assert calls_of(error, retry_on=lambda e: True)[0] == 4


def test_the_note_says_why_there_was_no_retry_and_how_to_ask_for_one() -> None:
    note = calls_of(AnswerError(404))[1]
    assert (
        "was not retried: status 404 is a final answer; retry_on=Exception retries that too" in note
    )
    assert "status 402 says that the budget is spent" in calls_of(AnswerError(402))[1]
    assert "ValueError is not known to pass" in calls_of(ValueError(), retry_on="transient")[1]


def test_a_group_is_retried_if_all_its_members_are_of_the_types() -> None:
    group = ExceptionGroup("g", [ConnectionError(), ExceptionGroup("h", [ConnectionResetError()])])
    assert calls_of(group, retry_on=ConnectionError)[0] == 4
    mixed = ExceptionGroup("g", [ConnectionError(), KeyError()])
    assert calls_of(mixed, retry_on=ConnectionError)[0] == 1


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(OperoUsageError, match="Did you mean 'transient'"):
        opero(retry_on="transent")


def test_a_value_with_a_final_answer_is_not_called_again() -> None:
    calls: list[str] = []

    @opero(cache=False, min_delay=0, retries=2, arg_fallback="key")
    def ask(key: Any = ("bad", "busy")) -> None:
        calls.append(key)
        raise AnswerError(401 if key == "bad" else 503)

    with pytest.raises(AnswerError):
        ask()
    assert calls == ["bad", "busy", "busy", "busy"]


@pytest.mark.parametrize("library", ["httpx", "requests"])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"error": {"code": "insufficient_quota"}}', "exhausted"),
        (b'{"errors": [{"reason": "dailyLimitExceeded"}]}', "exhausted"),
        (b'{"error": "slow down"}', "transient"),
        (b'{"error', "transient"),
        (b'{"error": ' + b"[" * 60_000, "transient"),
        (None, "transient"),
    ],
)
def test_codes_in_the_body_of_an_answer_that_was_read(
    library: str, body: bytes | None, kind: str
) -> None:
    module: Any = pytest.importorskip(library)
    if library == "httpx":
        response = module.Response(429, request=module.Request("GET", "http://h"))
    else:
        response = module.Response()
        response.status_code = 429
    if body is not None:
        response._content = body
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of the library
        response.raise_for_status()
    assert classify(caught.value).kind == kind


def test_an_exhausted_value_cools_down_for_later_calls() -> None:
    calls: list[str] = []

    @opero(cache=False, arg_fallback="key")
    def ask(key: Any = ("spent", "good")) -> str:
        calls.append(key)
        if key == "spent":
            raise AnswerError(429, {"error": {"code": "insufficient_quota"}})
        return str(key)

    with fake_clock() as clock, capture_events() as seen:
        assert isinstance(clock, FakeClock)
        assert [ask(), ask()] == ["good", "good"]
        assert calls == ["spent", "good", "good"]
        cooling = [e for e in seen if type(e).__name__ == "ValueCooling"]
        assert [(e.seconds, e.source) for e in cooling] == [  # type: ignore[attr-defined]
            (EXHAUSTED_SECONDS, "insufficient_quota")
        ]
        clock.advance(EXHAUSTED_SECONDS + 1)
        ask()
    assert calls[3:] == ["spent", "good"]
