# this_file: tests/core/test_retry_after.py
"""A service's request to wait, as real client libraries hand it on, and as foreign objects garble it."""

from __future__ import annotations

import asyncio
import collections
import datetime
import enum
import json
import math
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, SimpleNamespace
from unittest.mock import MagicMock, Mock

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.tables import rows

from opero.core.retry_after import Hint, requested_wait

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]

SENT = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
"""When the answers of these tests were sent, by the service's clock."""

NOW = SENT.timestamp()


def http_date(seconds):
    """The service's clock so many seconds later, as HTTP writes it."""
    return format_datetime(SENT + datetime.timedelta(seconds=seconds), usegmt=True)


class Answer:
    """What a response of any client has."""

    def __init__(self, headers, status=429):
        self.headers = headers
        self.status_code = status


def wait_of(headers, status=429, *, dated=True):
    """What an answer with these headers asks for."""
    date = {"Date": http_date(0)} if dated else {}
    return requested_wait(Answer({**date, **headers}, status), now=NOW)


# --- real clients ---------------------------------------------------------------------------------


class Service:
    """A service on this machine that answers everything in one way, with a clock 5 years off."""

    def __init__(self):
        service = self
        self.status, self.headers, self.body = 429, {"Retry-After": http_date(7)}, {}

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.dumps(service.body).encode()
                self.send_response_only(service.status)
                reported = {
                    "Date": http_date(0),
                    "Content-Type": "application/json",
                    **service.headers,
                }
                for name, value in reported.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815 - names of http.server

            def log_message(self, *args):
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def running():
    service = Service()
    yield service
    service.close()


@pytest.fixture
def service(running, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    running.status, running.headers, running.body = 429, {"Retry-After": http_date(7)}, {}
    return running


def error_of(call):
    """The exception that a call ends with."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - every client has its own
        return error
    raise AssertionError("the call was to fail")


def by_httpx(url):
    with httpx.Client() as client:
        client.get(url).raise_for_status()


def by_requests(url):
    with pytest.importorskip("requests").Session() as session:
        session.get(url).raise_for_status()


def by_aiohttp(url):
    aiohttp = pytest.importorskip("aiohttp")

    async def call():
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            await session.get(url)

    asyncio.run(call())


def by_urllib(url):
    try:
        urllib.request.urlopen(url)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def by_botocore(url):
    botocore_session = pytest.importorskip("botocore.session")
    config = pytest.importorskip("botocore.config").Config(retries={"total_max_attempts": 1})
    client = botocore_session.Session().create_client(
        "s3",
        region_name="eu-west-1",
        endpoint_url=url,
        aws_access_key_id="a",
        aws_secret_access_key="b",
        config=config,
    )
    try:
        client.list_buckets()
    finally:
        client.close()


def by_openai(url):
    import openai  # takes a second, which each worker would pay

    with openai.OpenAI(api_key="k", base_url=url, max_retries=0) as client:
        client.models.list()


def by_anthropic(url):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(api_key="k", base_url=url, max_retries=0) as client:
        client.models.list()


def by_google_api_core(url):
    exceptions = pytest.importorskip("google.api_core.exceptions")
    with pytest.importorskip("requests").Session() as session:
        raise exceptions.from_http_response(session.get(url))


def by_google_genai(url):
    genai = pytest.importorskip("google.genai")
    client = genai.Client(api_key="k", http_options={"base_url": url})
    try:
        client.models.generate_content(model="gemini-2.0-flash", contents="hello")
    finally:
        client.close()


CLIENTS = [
    by_httpx,
    by_requests,
    by_aiohttp,
    by_urllib,
    by_botocore,
    by_openai,
    by_anthropic,
    by_google_api_core,
    by_google_genai,
]

# What third parties warn of at import is not what is tested.
clients = pytest.mark.parametrize("call", CLIENTS, ids=lambda call: call.__name__[3:])
lenient = pytest.mark.filterwarnings("default")


@lenient
@clients
def test_errors_of_real_clients_carry_the_retry_after_date_against_the_answers_date(call, service):
    assert requested_wait(error_of(lambda: call(service.url))) == Hint(7.0, "retry-after")


@lenient
@clients
def test_errors_of_real_clients_carry_the_status_and_the_exhausted_bucket(call, service):
    service.headers = {
        "X-RateLimit-Remaining-Requests": "12",
        "X-RateLimit-Reset-Requests": "9m",
        "X-RateLimit-Remaining-Tokens": "0",
        "X-RateLimit-Reset-Tokens": "1m2.5s",
    }
    error = error_of(lambda: call(service.url))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert requested_wait(error) == Hint(62.5, "x-ratelimit-reset-tokens")
    # Other than 429 and 503: the limit is not what the call died of.
    service.status = 500
    assert requested_wait(error_of(lambda: call(service.url))) is None


RETRY_INFO = {
    "error": {
        "code": 429,
        "message": "quota",
        "status": "RESOURCE_EXHAUSTED",
        "details": [
            {"@type": "type.googleapis.com/google.rpc.Help", "links": []},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "38.25s"},
        ],
    }
}


@lenient
@pytest.mark.parametrize("body", [RETRY_INFO, [RETRY_INFO]], ids=["plain", "in a list"])
@pytest.mark.parametrize("call", [by_google_genai, by_openai, by_anthropic])
def test_retry_info_in_the_json_of_an_answer(call, body, service):
    service.headers, service.body = {}, body
    assert requested_wait(error_of(lambda: call(service.url))) == Hint(38.25, "RetryInfo")


@lenient
def test_retry_info_as_json_in_an_error_of_google_api_core(service):
    service.headers, service.body = {}, RETRY_INFO
    error = error_of(lambda: by_google_api_core(service.url))
    assert requested_wait(error) == Hint(38.25, "RetryInfo")


@lenient
def test_retry_info_as_a_protobuf_message_in_an_error_of_google_api_core():
    exceptions = pytest.importorskip("google.api_core.exceptions")
    messages = pytest.importorskip("google.rpc.error_details_pb2")
    info = messages.RetryInfo()
    info.retry_delay.FromMilliseconds(2_500)
    error = exceptions.ResourceExhausted("quota", details=[messages.DebugInfo(), info])
    assert requested_wait(error) == Hint(2.5, "RetryInfo")
    assert requested_wait(exceptions.Unknown("x", details=[messages.DebugInfo()])) is None


@lenient
def test_retry_info_that_a_grpc_status_carries():
    exceptions = pytest.importorskip("google.api_core.exceptions")
    rpc_status = pytest.importorskip("grpc_status.rpc_status")
    grpc = pytest.importorskip("grpc")
    any_pb2 = pytest.importorskip("google.protobuf.any_pb2")
    messages = pytest.importorskip("google.rpc.error_details_pb2")
    status_pb2 = pytest.importorskip("google.rpc.status_pb2")
    detail = any_pb2.Any()
    info = messages.RetryInfo()
    info.retry_delay.FromSeconds(4)
    detail.Pack(info)
    status = rpc_status.to_status(status_pb2.Status(code=8, message="quota", details=[detail]))

    class Failed(grpc.RpcError, grpc.Call):
        def __init__(self):
            super().__init__()

        def initial_metadata(self):
            return ()

        def trailing_metadata(self):
            return status.trailing_metadata

        def code(self):
            return status.code

        def details(self):
            return status.details

        def add_callback(self, callback):
            return False

        def cancel(self):
            return False

        def is_active(self):
            return False

        def time_remaining(self):
            return None

    assert requested_wait(exceptions.from_grpc_error(Failed())) == Hint(4.0, "RetryInfo")


@lenient
def test_a_botocore_error_of_a_plain_dict():
    client_error = pytest.importorskip("botocore.exceptions").ClientError
    metadata = {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}, "RetryAttempts": 0}
    answer = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": metadata}
    assert requested_wait(client_error(answer, "PutObject")) == Hint(3.0, "retry-after")
    assert requested_wait(client_error({"Error": {}}, "PutObject")) is None


@lenient
def test_a_response_is_read_like_an_error(service):
    with httpx.Client() as client:
        assert requested_wait(client.get(service.url)) == Hint(7.0, "retry-after")
    with pytest.importorskip("requests").Session() as session:
        assert requested_wait(session.get(service.url)) == Hint(7.0, "retry-after")


def test_a_connection_that_failed_says_nothing(service):
    error = error_of(lambda: by_httpx("http://127.0.0.1:1"))
    assert isinstance(error, httpx.ConnectError)
    assert requested_wait(error) is None
    error = error_of(lambda: by_openai("http://127.0.0.1:1"))
    assert type(error).__name__ == "APIConnectionError"
    assert requested_wait(error) is None


def test_reading_imports_no_client_library():
    code = """
import sys
from opero.core.retry_after import requested_wait
class Error(Exception):
    headers = {
        "Date": "Sun, 01 Mar 2026 12:00:00 GMT",
        "Retry-After": "Sun, 01 Mar 2026 12:00:09 GMT",
    }
assert requested_wait(Error()).seconds == 9
assert requested_wait(ValueError()) is None
clients = {"httpx", "requests", "aiohttp", "urllib3", "botocore", "openai", "anthropic", "google"}
found = clients & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- dialects -------------------------------------------------------------------------------------


@rows(
    ("headers", "seconds", "source"),
    [
        ({"retry-after-ms": "1500"}, 1.5, "retry-after-ms"),
        ({"retry-after-ms": "0.5", "retry-after": "9"}, 0.0005, "retry-after-ms"),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0, "retry-after"),
        ({"Retry-After": "0"}, 0.0, "retry-after"),
        ({"Retry-After": " 120 "}, 120.0, "retry-after"),
        ({"Retry-After": "1.25"}, 1.25, "retry-after"),
        ({"Retry-After": "30s"}, 30.0, "retry-after"),
        ({"RETRY-AFTER": "5"}, 5.0, "retry-after"),
        ({b"Retry-After": b"5"}, 5.0, "retry-after"),
        ({"Retry-After": 5}, 5.0, "retry-after"),
        ({"Retry-After": 5.5}, 5.5, "retry-after"),
        ({"Retry-After": ["5"]}, 5.0, "retry-after"),
        ({"Retry-After": "5, 8"}, 8.0, "retry-after"),
        ({"Retry-After": http_date(90)}, 90.0, "retry-after"),
        ({"Retry-After": http_date(-90)}, 0.0, "retry-after"),
        ({"Retry-After": "Sunday, 01-Mar-26 12:00:30 GMT"}, 30.0, "retry-after"),
        ({"Retry-After": "Sun Mar  1 12:00:30 2026"}, 30.0, "retry-after"),
        ({"Retry-After": "Sun, 01 Mar 2026 13:00:30 +0100"}, 30.0, "retry-after"),
        ({"Retry-After": "2026-03-01T12:00:30Z"}, 30.0, "retry-after"),
        ({"Retry-After": str(int(NOW) + 30)}, 30.0, "retry-after"),
    ],
)
@rows("status", [200, 429, 500])
def test_retry_after_in_every_spelling_whatever_the_status(headers, seconds, source, status):
    assert wait_of(headers, status) == Hint(pytest.approx(seconds), source)


@rows(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("120ms", 0.12),
        ("34.07s", 34.07),
        ("1h2m3s", 3723.0),
        ("1d", 86400.0),
        ("7", 7.0),
        ("0.25", 0.25),
        ("33011.382867", 33011.382867),
        (str(int(NOW) + 20), 20.0),
        (str(NOW + 20.5), 20.5),
        (str(int(NOW * 1000) + 20_500), 20.5),
        (str(int(NOW) - 20), 0.0),
        ("2026-03-01T12:00:20Z", 20.0),
        ("2026-03-01t12:00:20z", 20.0),
        ("2026-03-01T12:00:20.123456789Z", 20.123456),
        ("2026-03-01T14:00:20+02:00", 20.0),
        ("2026-03-01T12:00:20", 20.0),
        ("2026-03-01T11:00:00Z", 0.0),
        (http_date(20), 20.0),
    ],
)
@rows(
    ("remaining", "reset"),
    [
        ("X-RateLimit-Remaining", "X-RateLimit-Reset"),
        ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
        ("x-ratelimit-remaining-tokens-minute", "x-ratelimit-reset-tokens-minute"),
        ("x-rate-limit-remaining", "x-rate-limit-reset"),
        ("RateLimit-Remaining", "RateLimit-Reset"),
        ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ],
)
@rows("status", [429, 503])
def test_a_reset_in_every_spelling(remaining, reset, text, seconds, status):
    hint = wait_of({remaining: "0", reset: text}, status)
    assert hint == Hint(pytest.approx(seconds, abs=1e-4), reset.lower())


@pytest.mark.parametrize("status", [200, 400, 403, 404, 500, 502, 504, None, "429", True])
def test_a_reset_counts_only_when_the_service_throttles(status):
    assert wait_of({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "5"}, status) is None


def test_a_reset_counts_only_for_a_bucket_of_which_nothing_is_left():
    headers = {
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "6m",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "2s",
        "x-ratelimit-reset-images": "9m",
        "anthropic-ratelimit-tokens-remaining": "1",
        "anthropic-ratelimit-tokens-reset": "2026-03-01T13:00:00Z",
    }
    assert wait_of(headers) == Hint(2.0, "x-ratelimit-reset-tokens")


def test_of_two_empty_buckets_the_one_that_fills_later_counts():
    headers = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "3s",
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "soon",
    }
    assert wait_of(headers) == Hint(3.0, "x-ratelimit-reset-tokens")


def test_retry_after_counts_for_more_than_a_reset():
    headers = {"retry-after": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "5"}
    assert wait_of(headers) == Hint(1.0, "retry-after")


@pytest.mark.parametrize(
    "status",
    [
        SimpleNamespace(status=429),
        SimpleNamespace(code=429),
        SimpleNamespace(http_status=503),
        SimpleNamespace(status="RESOURCE_EXHAUSTED", code=429),
        SimpleNamespace(code=enum.IntEnum("Status", {"TOO_MANY": 429}).TOO_MANY),
        SimpleNamespace(response=SimpleNamespace(status_code=429)),
        SimpleNamespace(response={"ResponseMetadata": {"HTTPStatusCode": 429}}),
    ],
    ids=repr,
)
def test_a_status_by_any_name(status):
    status.headers = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "5"}
    assert requested_wait(status, now=NOW) == Hint(5.0, "x-ratelimit-reset")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(3, 3.0), (0.5, 0.5), ("4", 4.0), ("2m", 120.0), (datetime.timedelta(minutes=1), 60.0)],
)
def test_an_attribute_retry_after(value, seconds):
    assert requested_wait(SimpleNamespace(retry_after=value)) == Hint(seconds, "retry_after")
    within = SimpleNamespace(response=SimpleNamespace(retry_after=value))
    assert requested_wait(within) == Hint(seconds, "retry_after")


@pytest.mark.parametrize(
    "value",
    [-1, math.nan, math.inf, True, None, "", "soon", 10**400, datetime.timedelta(-1), print, b"3"],
)
def test_an_attribute_retry_after_that_is_no_time(value):
    assert requested_wait(SimpleNamespace(retry_after=value)) is None


def test_the_error_beneath_a_wrapped_one_is_asked():
    answered = ConnectionError()
    answered.response = Answer({"retry-after": "4"})
    middle, outer = KeyError(), ValueError()
    middle.__cause__, outer.__cause__ = answered, middle
    assert requested_wait(outer) == Hint(4.0, "retry-after")
    # What was merely being handled at the time has nothing to do with it.
    outer.__cause__, outer.__context__ = None, answered
    assert requested_wait(outer) is None


def test_headers_of_different_answers_are_not_mixed():
    dated = ConnectionError()
    dated.response = Answer({"date": http_date(-3600), "retry-after": "1"})
    outer = ValueError()
    outer.__cause__ = dated
    outer.response = Answer({"retry-after": http_date(5)})
    assert requested_wait(outer, now=NOW) == Hint(5.0, "retry-after")


def test_a_circle_of_causes_comes_to_an_end():
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert requested_wait(one) is None


# --- clocks ---------------------------------------------------------------------------------------

DATED = [
    {"retry-after": http_date(45)},
    {"retry-after": "2026-03-01T12:00:45"},
    {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW) + 45)},
    {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str((int(NOW) + 45) * 1000)},
    {
        "anthropic-ratelimit-tokens-remaining": "0",
        "anthropic-ratelimit-tokens-reset": "2026-03-01T12:00:45Z",
    },
]


@pytest.mark.parametrize("headers", DATED)
@pytest.mark.parametrize("hours", [-8, 0, 8])
def test_a_wrong_clock_changes_nothing_where_the_answer_is_dated(headers, hours, monkeypatch):
    monkeypatch.setattr("opero.core.retry_after.time.time", lambda: NOW + hours * 3600)
    answer = Answer({"Date": http_date(0), **headers})
    assert requested_wait(answer).seconds == pytest.approx(45)
    # Where it is not, there is only this machine's clock.
    assert requested_wait(Answer(headers)).seconds == pytest.approx(max(0, 45 - hours * 3600))


@pytest.mark.skipif(not hasattr(__import__("time"), "tzset"), reason="the zone is fixed")
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York", "XXX+11:30"])
def test_another_time_zone_changes_nothing(zone):
    code = f"""
from opero.core.retry_after import requested_wait
class Answer:
    status_code = 429
for dated in ({{}}, {{"Date": {http_date(0)!r}}}):
    for headers in {DATED!r}:
        Answer.headers = headers | dated
        assert abs(requested_wait(Answer, now={NOW}).seconds - 45) < 1e-3, headers
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TZ": zone})


@pytest.mark.parametrize("date", ["", "yesterday", None, 7, "Sun, 99 Mar 2026 12:00:00 GMT"])
def test_a_date_that_is_none_is_no_date(date):
    headers = {"date": date, "retry-after": http_date(6)}
    assert requested_wait(Answer(headers), now=NOW) == Hint(6.0, "retry-after")


# --- garbage --------------------------------------------------------------------------------------


@rows(
    "value",
    [
        "",
        " ",
        "-1",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "Infinity",
        "1e400",
        "9" * 100_000,
        "1,",
        ",",
        "1, x",
        "1, -1",
        "soon",
        "12:30",
        "0x10",
        "Mon, 99 Foo 2026 99:99:99 +999999999",
        "0001-01-01T00:00:00+23:59x",
        "\x00",
        "\N{SNOWMAN}",
        b"\xff\xfe",
        None,
        [],
        {},
        object(),
        print,
        10**400,
        10**6000,
        -5,
        math.nan,
        Mock(),
        MagicMock(),
    ],
)
def test_a_header_that_means_nothing_is_nothing(value):
    headers = {
        "retry-after-ms": value,
        "retry-after": value,
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": value,
    }
    assert wait_of(headers) is None
    assert wait_of({"x-ratelimit-remaining": value, "x-ratelimit-reset": "5"}) is None


def test_digits_without_end_are_read_at_once():
    # Minutes, if they were matched against the pattern of a span.
    for text in ("9" * 65_536 + "!", " " * 65_536 + "!", "1s" * 32_768 + "!"):
        assert wait_of({"retry-after": text}) is None
        info = {"@type": "RetryInfo", "retryDelay": text}
        assert requested_wait(SimpleNamespace(details=[info])) is None


def test_the_first_year_does_not_overflow():
    assert wait_of({"retry-after": "0001-01-01T00:00:00+23:59"}) == Hint(0.0, "retry-after")


def test_a_repeated_header_gives_its_longest_time():
    message = Message()
    for value in ("3", "11", "7"):
        message.add_header("Retry-After", value)
    assert requested_wait(SimpleNamespace(headers=message)) == Hint(11.0, "retry-after")
    several = httpx.Headers([("retry-after", "3"), ("Retry-After", "11")])
    assert requested_wait(SimpleNamespace(headers=several)) == Hint(11.0, "retry-after")


@pytest.mark.parametrize(
    "headers",
    [
        [("Retry-After", "2")],
        ((b"retry-after", b"2"),),
        MappingProxyType({"Retry-After": "2"}),
        collections.UserDict({"Retry-After": "2"}),
        {1: 2, None: 3, ("a",): "b", "Retry-After": "2"},
        {"x": object(), "Retry-After": "2"},
    ],
    ids=lambda headers: type(headers).__name__,
)
def test_headers_of_any_shape(headers):
    assert requested_wait(SimpleNamespace(headers=headers)) == Hint(2.0, "retry-after")


@pytest.mark.parametrize(
    "headers",
    [
        None,
        "Retry-After: 2",
        7,
        object(),
        {"Retry-After"},
        [1, 2],
        [("Retry-After",)],
        SimpleNamespace(items=7),
        SimpleNamespace(items=lambda: 7),
        SimpleNamespace(items=lambda extra: 7),
        Mock(),
        MagicMock(),
        dict,
    ],
)
def test_headers_that_are_none(headers):
    assert requested_wait(SimpleNamespace(headers=headers)) is None


class TrapError(Exception):
    """Whatever is read raises."""

    def __getattribute__(self, name):
        raise ZeroDivisionError(name)


class LiarError(Exception):
    """Its class cannot be asked for, and its parts are not what they seem."""

    @property
    def __class__(self):
        raise RuntimeError

    response = property(lambda self: 1 / 0)
    details = property(lambda self: [TrapError(), {"@type": TrapError()}])


class Classless:
    """No exception, and not to be asked whether it is one."""

    @property
    def __class__(self):
        raise RuntimeError


class Endless(dict):
    """A mapping without end."""

    def get(self, name, default=None):
        return self

    def items(self):
        while True:
            raise RecursionError


circular = {}
circular["error"] = circular["details"] = circular


STRANGERS = {
    "none": lambda: None,
    "number": lambda: 7,
    "text": lambda: "text",
    "bytes": lambda: b"bytes",
    "object": object,
    "class": lambda: Exception,
    "exception": Exception,
    "trap": TrapError,
    "liar": LiarError,
    "classless": Classless,
    "mock": Mock,
    "magic mock": MagicMock,
    "mock of an exception": lambda: Mock(spec=Exception),
    "mock of a client's exception": lambda: MagicMock(spec=httpx.HTTPStatusError),
    "endless": Endless,
    "trap for a response": lambda: SimpleNamespace(response=TrapError()),
    "endless response": lambda: SimpleNamespace(response=Endless()),
    "trap for headers": lambda: SimpleNamespace(headers=TrapError()),
    "circular details": lambda: SimpleNamespace(details=circular),
    "circular details in a list": lambda: SimpleNamespace(details=[circular]),
    "endless body": lambda: SimpleNamespace(body=Endless()),
    "trap for details": lambda: SimpleNamespace(details=TrapError()),
    "httpx without request": lambda: httpx.HTTPError("its request raises"),
    "urllib without headers": lambda: urllib.error.URLError("no headers"),
}


@rows("make", STRANGERS.values())
def test_foreign_objects_may_do_anything(make):
    assert requested_wait(make()) is None


@pytest.mark.parametrize(
    "detail",
    [
        {"@type": 7, "retryDelay": "3s"},
        {"@type": "Help", "retryDelay": "3s"},
        {"@type": "RetryInfo"},
        {"@type": "RetryInfo", "retryDelay": "-3s"},
        {"@type": "RetryInfo", "retryDelay": 10**400},
        SimpleNamespace(retry_delay=SimpleNamespace(seconds=-1, nanos=0)),
        SimpleNamespace(retry_delay=SimpleNamespace(seconds=10**400, nanos=0)),
        SimpleNamespace(retry_delay=datetime.timedelta(-1)),
        SimpleNamespace(retry_delay=7),
    ],
)
def test_a_retry_info_that_means_nothing_is_nothing(detail):
    assert requested_wait(SimpleNamespace(details=[detail])) is None


def test_a_retry_info_as_proto_plus_shows_it():
    info = SimpleNamespace(retry_delay=datetime.timedelta(seconds=1.5))
    assert requested_wait(SimpleNamespace(details=[info])) == Hint(1.5, "RetryInfo")


def test_one_broken_part_does_not_hide_the_others():
    class HalfError(Exception):
        response = property(lambda self: 1 / 0)
        headers = MappingProxyType({"Retry-After": "3"})

    assert requested_wait(HalfError()) == Hint(3.0, "retry-after")

    class BrokenError(Exception):
        headers = {"Retry-After": TrapError()}  # noqa: RUF012 - a foreign class
        response = Answer({"retry-after-ms": "250"})

    assert requested_wait(BrokenError()) == Hint(0.25, "retry-after-ms")


def test_a_number_beyond_all_bounds_does_not_hide_the_others():
    headers = {"retry-after-ms": 10**400, "retry-after": "3"}
    assert wait_of(headers) == Hint(3.0, "retry-after")


def test_an_interrupt_while_a_foreign_object_is_asked_passes():
    class SlowError(Exception):
        @property
        def headers(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requested_wait(SlowError())


names = st.sampled_from(
    [
        "Retry-After",
        "retry-after-ms",
        "Date",
        "x-ratelimit-remaining",
        "x-ratelimit-reset",
        "X-RateLimit-Remaining-Tokens",
        "x-ratelimit-reset-tokens",
        "anthropic-ratelimit-tokens-remaining",
        "anthropic-ratelimit-tokens-reset",
    ]
)
amounts = st.one_of(st.integers(), st.floats(), st.decimals()).map(str)
moments = st.datetimes().map(lambda moment: moment.isoformat() + "Z")
http_dates = st.datetimes(timezones=st.just(datetime.UTC)).map(
    lambda moment: format_datetime(moment, usegmt=True)
)
texts = st.one_of(
    st.text(max_size=20),
    st.text("0123456789.,-+:eE smhdZT_", max_size=20),
    amounts,
    moments,
    http_dates,
    st.tuples(amounts, st.sampled_from(["s", "ms", "m", "h", "d", "w", "x"])).map("".join),
)
scalars = st.one_of(
    texts, texts.map(lambda text: text.encode()), st.integers(), st.floats(), st.none()
)
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dates(), st.binary())
keys = st.one_of(names, names.map(str.encode), st.text(max_size=10), st.integers())
headers = st.dictionaries(keys, values, max_size=8)


@given(headers, st.sampled_from([200, 429, 503]), st.floats(0, 1e11))
@example({"Retry-After": "9" * 400}, 429, 0.0)
@example({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1e308"}, 429, 0.0)
def test_whatever_the_headers_a_wait_is_finite_and_never_negative(headers, status, now):
    hint = requested_wait(Answer(headers, status), now=now)
    assert hint is None or (type(hint.seconds) is float and 0 <= hint.seconds < math.inf)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["@type", "error", "details", "retryDelay", "ResponseMetadata", "headers"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["response", "headers", "details", "body", "retry_after", "status", "code"]
        ),
        json_values,
    )
)
def test_whatever_the_attributes_a_wait_is_finite_and_never_negative(attributes):
    hint = requested_wait(SimpleNamespace(**attributes))
    assert hint is None or (type(hint.seconds) is float and 0 <= hint.seconds < math.inf)
