# this_file: examples/badday/wire.py
"""As much of HTTP/1.1 as the example server speaks: bytes to requests, answers to bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import cached_property
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_HEAD_LIMIT = 64 * 1024
_BODY_LIMIT = 4 * 1024 * 1024


class WireError(ValueError):
    """Bytes that are no request this server reads; carries the status to refuse them with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """One request; header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def json(self) -> dict[str, Any]:
        """The body's JSON object; empty when it is none."""
        try:
            found = json.loads(self.body) if self.body else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def key(self) -> str:
        """The caller's API key: bearer token or `X-API-Key`; empty when there is none."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme.lower() == "bearer" else self.headers.get("x-api-key", "")

    @cached_property
    def fields(self) -> dict[str, str]:
        """What a script can look at: query, top-level strings and numbers of the body, `key`."""
        body = {
            name: str(value) for name, value in self.json.items() if isinstance(value, str | int)
        }
        return body | dict(parse_qsl(self.query)) | {"key": self.key}


def take_request(buffer: bytearray) -> Request | None:
    r"""Cut the first complete request off `buffer`; None when there is more of it to come.

    Raises:
        WireError: What stands in the buffer can never become a request.

    Example:
        >>> buffer = bytearray(b"GET /users?id=7 HTTP/1.1\r\nHost: x\r\n\r\nGET")
        >>> take_request(buffer).fields["id"], bytes(buffer)
        ('7', b'GET')
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        if len(buffer) > _HEAD_LIMIT:
            raise WireError(431, "the header is too long")
        return None
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    try:
        method, target, _version = first.split(" ")
        pairs = (line.split(":", 1) for line in lines)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        length = int(headers.get("content-length", "0"))
    except ValueError:
        raise WireError(400, "this is not HTTP/1.1") from None
    if "transfer-encoding" in headers:
        raise WireError(411, "send a Content-Length; chunked bodies are not read")
    if not 0 <= length <= _BODY_LIMIT:
        raise WireError(413, "the body is too long")
    start = end + 4
    if len(buffer) < start + length:
        return None
    body = bytes(buffer[start : start + length])
    del buffer[: start + length]
    url = urlsplit(target)
    return Request(method, url.path, url.query, headers, body)


def render(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole answer with a JSON body, its length and a `Date`."""
    content = json.dumps(body, ensure_ascii=False).encode()
    lines = [
        f"HTTP/1.1 {status} {_phrase(status)}",
        f"Date: {formatdate(usegmt=True)}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
