# this_file: tests/examples/badday/test_wire.py
"""Bytes to requests, at any boundary."""

from __future__ import annotations

import json

import pytest
from badday.wire import Request, WireError, render, take_request

POST = (
    b"POST /chat?model=x HTTP/1.1\r\nHost: here\r\nContent-Length: 13\r\n"
    b'Authorization: Bearer sk-1\r\n\r\n{"model":"y"}'
)


@pytest.mark.parametrize("cut", range(0, len(POST), 7))
def test_a_request_is_taken_only_when_it_is_complete(cut: int) -> None:
    buffer = bytearray(POST[:cut])
    assert take_request(buffer) is None
    buffer += POST[cut:]
    request = take_request(buffer)
    assert request is not None
    assert request.json == {"model": "y"}
    assert not buffer


def test_two_requests_in_one_packet_are_taken_one_by_one() -> None:
    buffer = bytearray(POST * 2)
    assert take_request(buffer)
    assert bytes(buffer) == POST


def test_the_query_wins_over_the_body_and_the_key_is_a_field() -> None:
    request = take_request(bytearray(POST))
    assert request is not None
    assert request.fields == {"model": "x", "key": "sk-1"}


def test_a_body_that_is_no_json_object_has_no_fields() -> None:
    for body in (b"[1]", b"\xff", b"{"):
        assert Request("POST", "/", "", {}, body).fields == {"key": ""}


def test_an_api_key_header_counts_as_the_key() -> None:
    assert Request("GET", "/", "", {"x-api-key": "k"}, b"").key == "k"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"GET /" + b"x" * 70_000, 431),
    ],
)
def test_what_can_never_be_a_request_is_refused(sent: bytes, status: int) -> None:
    with pytest.raises(WireError) as caught:
        take_request(bytearray(sent))
    assert caught.value.status == status


def test_an_answer_carries_its_length_and_headers() -> None:
    head, _, body = render(429, {"a": "ä"}, {"Retry-After": "1"}).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Retry-After: 1" in head
    assert json.loads(body) == {"a": "ä"}
