# this_file: src/opero/core/classify.py
"""Classify failures: answered for good, out of budget, likely to pass, or unknown.

No client library is imported. httpx, requests, aiohttp, urllib, botocore, openai, anthropic,
google-api-core, grpc, redis and the database drivers are known by the names of their classes and by
what their errors carry: a response, a status, headers, a code. Those objects are foreign and may do
anything when they are read.
"""

from __future__ import annotations

import builtins
import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

from opero.errors import Rejected
from opero.utils.checks import function

T = TypeVar("T")
Kind = Literal["final", "exhausted", "transient", "unknown"]


class Verdict(NamedTuple):
    """What an error says about another attempt.

    Attributes:
        kind: "final" (the same call would fail again), "exhausted" (so would any call until the
            budget is renewed), "transient" (known to pass) or "unknown".
        reason: What says so: "status 404", "insufficient_quota".
    """

    kind: Kind
    reason: str = ""

    @property
    def ends_value(self) -> bool:
        """Whether the call is not worth making again with the same arguments."""
        return self.kind in ("final", "exhausted")


UNKNOWN: Final = Verdict("unknown")

Classifier = Callable[[BaseException], "Kind | None"]
"""Returns the kind of an error, None if it does not know it."""

_classifiers: list[Classifier] = []


def add_classifier(classifier: Classifier) -> Callable[[], None]:
    """Let a function classify errors before the built-in rules do; return what removes it again.

    Args:
        classifier: Gets the error of a call and returns "final", "exhausted", "transient" or
            "unknown"; None leaves the error to the next classifier. One that raises counts as None.

    Example:
        >>> class OutOfStock(Exception): ...
        >>> remove = add_classifier(lambda error: "final" if isinstance(error, OutOfStock) else None)
        >>> classify(OutOfStock()).kind
        'final'
        >>> remove()
        >>> classify(OutOfStock()).kind
        'unknown'
    """
    function("classifier", classifier)
    _classifiers.append(classifier)

    def remove() -> None:
        if classifier in _classifiers:
            _classifiers.remove(classifier)

    return remove


# --- tables ---------------------------------------------------------------------------------------


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_FINAL_STATUSES: Final = frozenset({
    400, 401, 403, 404, 405, 406, 410, 411, 412, 413, 414, 415, 416, 417,
    421, 422, 426, 428, 431, 451, 501, 505,
})  # fmt: skip
_TRANSIENT_STATUSES: Final = frozenset({408, 409, 425, 429, *range(500, 600)}) - _FINAL_STATUSES

_CODES: Final[Mapping[Kind, frozenset[str]]] = {
    "exhausted": _words(
        "insufficient_quota billing_hard_limit_reached billing_not_active billing_error",
        "quota_exceeded quotaexceeded dailylimitexceeded insufficient_balance",
        "insufficient_credits insufficient_funds credit_balance_too_low",
    ),
    # Of botocore's and google's retry rules; some of these answers have status 400 or 403.
    "transient": _words(
        "throttling throttlingexception throttledexception requestthrottledexception slowdown",
        "toomanyrequestsexception provisionedthroughputexceededexception requestlimitexceeded",
        "transactioninprogressexception bandwidthlimitexceeded limitexceededexception",
        "requestthrottled priorrequestnotcomplete ec2throttledexception requesttimeout",
        "requesttimeoutexception internalerror internalfailure internalservererror",
        "serviceunavailable serviceunavailableexception ratelimitexceeded userratelimitexceeded",
        "rate_limit_exceeded overloaded_error",
        # What a stream says that had begun with status 200.
        "rate_limit_error api_error server_error timeout_error",
    ),
}
_GRPC: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"), "transient"),
    "INTERNAL": "transient",
    **dict.fromkeys(("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED"), "final"),
    **dict.fromkeys(("UNAUTHENTICATED", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"), "final"),
}  # fmt: skip
_SQLSTATES: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("08", "40", "53", "57P", "55P03", "58"), "transient"),
    **dict.fromkeys(("0A", "21", "22", "23", "26", "28", "2B", "3D", "3F", "42", "44"), "final"),
}  # fmt: skip
_SQLITE_BUSY: Final = frozenset((5, 6))
_MYSQL: Final[Mapping[int, Kind]] = {
    **dict.fromkeys((1040, 1205, 1213, 2002, 2003, 2006, 2013, 2055, 3024), "transient"),
    **dict.fromkeys((1044, 1045, 1049, 1054, 1062, 1064, 1146), "final"),
}  # fmt: skip
_NETWORK: Final = frozenset(
    getattr(errno, name)
    for name in (
        "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EADDRNOTAVAIL",
        "ETIMEDOUT", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "EPIPE", "EAGAIN",
    )
    if hasattr(errno, name)
)  # fmt: skip

_DATABASES: Final = _words(
    "sqlite3 psycopg psycopg2 asyncpg pymysql mysql MySQLdb oracledb cx_Oracle pyodbc pg8000",
    "sqlalchemy pymssql duckdb",
)
_LIBPQ: Final = _words("psycopg psycopg2")
"""Drivers whose errors have a state unless the server was not reached."""
# Top-level package → names of classes; derived classes are found by their bases.
_CLASSES: Final[Mapping[Kind, Mapping[str, frozenset[str]]]] = {
    "final": {
        **dict.fromkeys(
            _DATABASES, _words("IntegrityError ProgrammingError DataError NotSupportedError")
        ),
        "httpx": _words("UnsupportedProtocol InvalidURL LocalProtocolError TooManyRedirects"),
        "requests": _words("InvalidURL InvalidSchema MissingSchema InvalidHeader TooManyRedirects"),
        "urllib3": _words("LocationValueError"),
        "aiohttp": _words("InvalidURL TooManyRedirects ClientConnectorCertificateError"),
        "botocore": _words(
            "NoCredentialsError PartialCredentialsError ParamValidationError NoRegionError",
            "SSOError TokenRetrievalError",
        ),
        "google": _words("DefaultCredentialsError"),
        "redis": _words(
            "AuthenticationError AuthorizationError NoPermissionError DataError",
            "AuthenticationWrongNumberOfArgsError",
        ),
        "pymongo": _words("DuplicateKeyError ConfigurationError InvalidOperation"),
        "ssl": _words("SSLCertVerificationError"),
        "http": _words("InvalidURL"),
    },
    "transient": {
        "httpx": _words("TransportError"),
        "httpcore": _words("NetworkError TimeoutException RemoteProtocolError"),
        "requests": _words("ConnectionError Timeout ChunkedEncodingError"),
        "urllib3": _words("TimeoutError ProtocolError NewConnectionError"),
        "aiohttp": _words("ClientConnectionError ClientPayloadError"),
        "botocore": _words("ConnectionError HTTPClientError"),
        "openai": _words("APIConnectionError"),
        "anthropic": _words("APIConnectionError"),
        "redis": _words(
            "ConnectionError TimeoutError TryAgainError ClusterDownError ReadOnlyError WatchError"
        ),
        "pymongo": _words("AutoReconnect NetworkTimeout ServerSelectionTimeoutError"),
        "asyncpg": _words("InterfaceError"),
        "sqlalchemy": _words("TimeoutError"),
        "google": _words("TransportError"),
        "socket": _words("gaierror"),
        "ssl": _words("SSLEOFError SSLZeroReturnError"),
        "asyncio": _words("IncompleteReadError"),
        "http": _words("IncompleteRead BadStatusLine RemoteDisconnected"),
    },
}

_MAX_CAUSES: Final = 8
"""Errors read along a chain of causes: chains may be long, even circular."""

_MAX_MEMBERS: Final = 64
_MAX_TEXT: Final = 128
"""Characters of a header or code; no date is longer, and patterns may be slow on very long text."""

_MAX_BODY: Final = 1 << 16
"""Bytes of a body that is read for codes."""

_UNBILLED_STATUSES: Final = frozenset((401, 403, 404, 429, *range(500, 600)))
# The same among the codes of grpc.
_UNBILLED_CODES: Final = _words(
    "UNAUTHENTICATED PERMISSION_DENIED NOT_FOUND RESOURCE_EXHAUSTED UNAVAILABLE INTERNAL UNIMPLEMENTED"
)
# Raised before anything was sent, by the standard library and by HTTP clients, or by what was raised there.
_NO_CONNECTION: Final = _words(
    "APIConnectionError ClientConnectorError ConnectError ConnectTimeout ConnectTimeoutError",
    "ConnectionError ConnectionRefusedError EndpointConnectionError NewConnectionError gaierror",
    "PoolTimeout SSLCertVerificationError",
)
# Raised when something had been sent.
_SENT: Final = _words(
    "BrokenPipeError ConnectionAbortedError ConnectionResetError ProtocolError ReadError",
    "ReadTimeout ReadTimeoutError RemoteDisconnected RemoteProtocolError WriteError WriteTimeout",
)
_CERTIFICATE: Final = "SSLCertVerificationError"
_STATUS_NAMES: Final = ("status_code", "status", "http_status", "code")


# --- decisions ------------------------------------------------------------------------------------


def classify(error: BaseException) -> Verdict:
    """Return what an error says about another attempt.

    It is read from the error, its response, its causes, or the members of an exception group: one
    member that is final makes the group final, and a group is transient if all members are.

    Args:
        error: An exception. Whatever it does when it is read, this function does not raise.

    Example:
        >>> classify(ConnectionResetError()).kind, classify(ValueError()).kind
        ('transient', 'unknown')
    """
    if type(error) is Rejected:
        return UNKNOWN
    for classifier in tuple(_classifiers):
        try:
            kind = classifier(error)
        except Exception:  # noqa: BLE001 - the failure at hand must not be replaced
            kind = None
        if kind is not None:
            return Verdict(kind, f"{getattr(classifier, '__qualname__', 'a classifier')}()")
    verdict = first_found(error, _of_one, _of_group) or UNKNOWN
    if verdict.kind == "transient":
        # Clients count it as a failed connection, and hold it as what was being handled.
        refused = first_found(error, _of_certificate, _of_group, contexts=True)
        return refused or verdict
    return verdict


def may_be_billed(error: BaseException) -> bool:
    """Return whether a call that ended with this error may cost something.

    It cannot if there was no connection, or if the service has refused it (401, 403, 404, 429) or was out of order
    (5xx). The error, its response, what lies behind it and the members of an exception group are looked at.
    """

    def sent(node: Any) -> bool | None:
        return type(node).__name__ in _SENT or None

    def billed(node: Any) -> bool | None:
        status = read_status((node, safe_get(node, "response")))
        if status is not None:
            return status not in _UNBILLED_STATUSES
        code = _grpc_code(node)
        if code is not None:
            return code not in _UNBILLED_CODES
        if type(node).__name__ in _NO_CONNECTION:
            return first_found(node, sent, lambda members: True in members, contexts=True) is True
        return sent(node)

    return (
        first_found(
            error, billed, lambda members: members.count(False) < len(members), contexts=True
        )
        is not False
    )


def _of_group(verdicts: list[Verdict | None]) -> Verdict | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    for kind in ("exhausted", "final"):
        for verdict in known:
            if verdict.kind == kind:
                return verdict
    return known[0] if known and len(known) == len(verdicts) else None


def _of_one(error: Any) -> Verdict | None:
    if says_nothing(error):
        return _of_type(error)
    response = safe_get(error, "response")
    places = (error,) if response is None else (error, response)
    bodies = safe_get(error, "body"), _body_of(response)
    codes = [code for place in (*places, *bodies) for code in _codes(place)]
    for kind, known in _CODES.items():
        for code in codes:
            if code.lower() in known:
                return Verdict(kind, code)
    return _of_answer(error, places) or _of_driver(error) or _of_type(error)


def _of_certificate(error: BaseException) -> Verdict | None:
    return Verdict("final", _CERTIFICATE) if _CERTIFICATE in _names(error) else None


def _of_answer(error: BaseException, places: tuple[object, ...]) -> Verdict | None:
    """Classify by the status and headers of an answer."""
    headers: dict[str, str] = {}
    for place in places:
        headers |= read_headers(place)
    asked = headers.get("x-should-retry", "").lower()
    if asked in ("true", "false"):
        return Verdict("transient" if asked == "true" else "final", f"x-should-retry: {asked}")
    status = read_status(places)
    if status is None:
        return None
    reason = f"status {status}"
    if type(safe_get(error, "__cause__")).__module__ == "aiohttp.http_exceptions":
        return Verdict("transient", "a broken answer")  # it gives what is no HTTP the status 400
    if status == 402 or (status == 400 and "credit balance" in str(error)[:1000].lower()):
        return Verdict("exhausted", reason)
    if status == 403 and ("retry-after" in headers or headers.get("x-ratelimit-remaining") == "0"):
        return Verdict("transient", reason)  # GitHub's limits
    if status in _FINAL_STATUSES:
        return Verdict("final", reason)
    return Verdict("transient", reason) if status in _TRANSIENT_STATUSES else None


def _of_driver(error: BaseException) -> Verdict | None:
    """Classify by the codes of grpc and of database drivers."""
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    name = _grpc_code(error)
    if name is not None and name in _GRPC:
        return Verdict(_GRPC[name], name)
    args = safe_get(error, "args")
    first = args[0] if isinstance(args, tuple) and args else None
    state = safe_get(error, "sqlstate") or safe_get(error, "pgcode")
    if "pyodbc" in packages:
        state = first
    if isinstance(state, str) and len(state) == 5:
        for length in (5, 3, 2):
            if state[:length] in _SQLSTATES:
                return Verdict(_SQLSTATES[state[:length]], f"SQLSTATE {state}")
    if not packages & _DATABASES:
        return None
    number = safe_get(error, "sqlite_errorcode")
    if isinstance(number, int) and number & 0xFF in _SQLITE_BUSY:
        return Verdict("transient", "database is busy")
    number = safe_get(error, "errno") or first
    if isinstance(number, int) and number in _MYSQL:
        return Verdict(_MYSQL[number], f"error {number}")
    if safe_get(first, "isrecoverable") is True:  # oracledb's
        return Verdict("transient", "recoverable")
    if packages & _LIBPQ and not state and "OperationalError" in _names(error):
        return Verdict("transient", "no connection")
    return None


def _grpc_code(error: object) -> str | None:
    """Return the name of the code of an error of grpc, None of any other."""
    if not any(cls.__module__.partition(".")[0] == "grpc" for cls in type(error).__mro__):
        return None
    code = safe_get(error, "code")
    name = safe_get(code() if callable(code) else code, "name")
    return name if isinstance(name, str) else None


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _of_type(error: BaseException) -> Verdict | None:
    """Classify by class: of client libraries by name, of Python itself."""
    for kind, table in _CLASSES.items():
        for cls in type(error).__mro__:
            if cls.__name__ in table.get(cls.__module__.partition(".")[0], ()):
                return Verdict(kind, cls.__name__)
    if issubclass(type(error), (ConnectionError, TimeoutError)):
        return Verdict("transient", type(error).__name__)
    if issubclass(type(error), OSError) and safe_get(error, "errno") in _NETWORK:
        return Verdict("transient", type(error).__name__)
    return None


# --- reading foreign objects ----------------------------------------------------------------------


def first_found(
    subject: object,
    read: Callable[[Any], T | None],
    combine: Callable[[list[T | None]], T | None],
    *,
    contexts: bool = False,
    depth: int = 0,
) -> T | None:
    """Return what is read from an error, from the members of a group, or else from its causes.

    Args:
        subject: An error, or a response, which has no causes.
        read: Reads one of them. Those are foreign objects: where it raises, it has found nothing.
        combine: Makes one finding of those of a group's members.
        contexts: Whether the error that was being handled counts as a cause.
        depth: Groups around the subject.
    """
    node: Any = subject
    for _ in range(_MAX_CAUSES - depth):
        try:
            found = read(node)
        except Exception:  # noqa: BLE001 - the failure at hand must not be replaced
            found = None
        # Asked of the type: an object may lie about its class, or raise.
        if found is None and issubclass(type(node), BaseExceptionGroup):
            members = (safe_get(node, "exceptions") or ())[:_MAX_MEMBERS]
            within = [
                first_found(e, read, combine, contexts=contexts, depth=depth + 1) for e in members
            ]
            found = combine(within)
        if found is not None or not issubclass(type(node), BaseException):
            return found
        # urllib's URLError and urllib3's MaxRetryError hold the cause in `reason`.
        cause = safe_get(node, "reason")
        if not issubclass(type(cause), BaseException):
            cause = safe_get(node, "__cause__")
        if cause is None and contexts and not safe_get(node, "__suppress_context__"):
            cause = safe_get(node, "__context__")
        if cause is None:
            break
        node = cause
    return None


def says_nothing(error: object) -> bool:
    """Whether an error is one of Python's own that carries no attributes: there is nothing to read."""
    kind = type(error)
    return (
        issubclass(kind, BaseException)
        and getattr(builtins, kind.__name__, None) is kind
        and not vars(error)
    )


def safe_get(thing: object, name: str) -> Any:
    """Return an attribute, None if there is none or reading it fails."""
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - httpx raises RuntimeError for a missing request, others their own
        return None


def read_headers(place: object, wanted: Callable[[str], object] | None = None) -> dict[str, str]:
    """Return the headers of an error or response, by name in lower case; of a repeated one all values.

    Args:
        place: The error or response.
        wanted: Returns whether a name is kept; None for those that decide about a retry.
    """
    found = safe_get(place, "headers")
    if found is None and isinstance(place, Mapping):
        # botocore: `error.response` is a plain dict
        found = _metadata(place, "HTTPHeaders") or place.get("headers")
    result: dict[str, str] = {}
    if found is None:
        return result
    keep = wanted or _RETRY_HEADERS.__contains__
    try:
        pairs = found if isinstance(found, list | tuple) else found.items()
        for name, value in pairs:
            name = header_text(name).lower()
            if keep(name):
                value = header_text(value)
                # As any recipient may do: RFC 9110 §5.2
                result[name] = f"{result[name]}, {value}" if name in result else value
    except Exception:  # noqa: BLE001 - what was read before counts
        return result
    return result


_RETRY_HEADERS: Final = frozenset(("retry-after", "x-ratelimit-remaining", "x-should-retry"))


def _metadata(response: Mapping[Any, Any], name: str) -> Any:
    metadata = response.get("ResponseMetadata")
    return metadata.get(name) if isinstance(metadata, Mapping) else None


def header_text(value: object) -> str:
    """Return a header's name or value as text; anything strange is empty."""
    if isinstance(value, list | tuple):
        return ", ".join(header_text(each) for each in value[:2])
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    elif isinstance(value, int | float):
        value = repr(value)
    return str(value).strip() if isinstance(value, str) and len(value) <= _MAX_TEXT else ""


def read_status(places: tuple[object, ...]) -> int | None:
    """Return the first HTTP status that an error or its response carries."""
    for place in places:
        # One after the other: aiohttp warns of a read of `code`, but has `status`.
        for name in _STATUS_NAMES:
            status = safe_get(place, name)
            if isinstance(status, int) and not isinstance(status, bool) and 100 <= status < 600:
                return int(status)
        if isinstance(place, Mapping):
            status = _metadata(place, "HTTPStatusCode")
            if isinstance(status, int):
                return int(status)
    return None


def _codes(place: object) -> Iterator[str]:
    """Yield the codes in an error, a response or the body of an answer."""
    if place is None:
        return
    read = place.get if isinstance(place, Mapping) else lambda name: safe_get(place, name)
    for name in ("code", "type", "Code", "reason", "status"):
        value = read(name)
        if isinstance(value, str) and len(value) <= _MAX_TEXT:
            yield value
    if isinstance(place, Mapping):
        inner = place.get("error") or place.get("Error")
        if isinstance(inner, Mapping):
            yield from _codes(inner)
    # The second one is googleapiclient's.
    details = read("errors") if isinstance(place, Mapping) else read("error_details")
    if isinstance(details, list | tuple):
        for each in details[:_MAX_CAUSES]:
            if isinstance(each, Mapping):
                yield from _codes(each)


def _body_of(response: object) -> object:
    """Return the JSON body of an answer, if httpx or requests have read it already."""
    content = safe_get(response, "_content")  # `content` would read it from the network
    if type(content) is not bytes or len(content) > _MAX_BODY or b'"error' not in content:
        return None
    import json

    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
