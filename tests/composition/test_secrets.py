# this_file: tests/composition/test_secrets.py
"""No value of a secret parameter is ever shown, wherever opero speaks."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from tests.tables import rows

from opero import failures, opero
from opero.testing import capture_events

SECRET = "hunter2-s3cr3t"
SPARE = "spare-s3cr3t"


def shown_by(fetch: Any, face: Any, *args: Any, **kwargs: Any) -> str:
    """Everything that opero says of a call that fails and of one that works, in one text."""
    said: list[object] = [fetch.explain(), fetch.options, fetch]
    if fetch.options.cache:
        said.append(fetch.cache)
    with capture_events() as events, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for begin in (fetch, fetch.call):
            try:
                said.append(face.run(begin, *args, **kwargs))
            except Exception as error:  # noqa: BLE001 - any will do
                said += [error.__notes__, *failures(error), *vars(error).values()]
                said += traceback.format_exception_only(error)
    said += [*events, *warned, fetch.stats, fetch.call.__doc__, fetch.explain()]
    return "\n".join(f"{thing!r}\n{thing}" for thing in said)


def of_works(works: bool, result: object = "fine") -> Callable[..., Any]:
    calls = 0

    def judge() -> Any:
        nonlocal calls
        calls += 1
        # The first value fails always, so that there is something to tell of.
        if calls % 2 or not works:
            raise ConnectionError("refused")
        return result

    return judge


@rows("works", [True, False])
@rows("cached", [True, False])
@rows(
    "name",
    [
        "api_key",
        "key",
        "token",
        "access_tokens",
        "password",
        "auth",
        "DSN",
        "clientSecret",
        "openai_api_keys",
    ],
)
def test_a_parameter_that_looks_secret_is_never_shown(
    face: Any, works: bool, cached: bool, name: str
) -> None:
    judge = of_works(works)
    exec(f"def fetch({name}): return judge()", scope := {"judge": judge})
    fetch = opero(cache=cached, min_delay=0, retries=1, arg_fallback=name)(face.of(scope["fetch"]))
    said = shown_by(fetch, face, [SECRET, SPARE])
    assert "s3cr3t" not in said
    assert f"{name}[1]" in said


@pytest.mark.parametrize("works", [True, False], ids=["works", "fails"])
def test_a_parameter_declared_secret_is_never_shown(face: Any, works: bool) -> None:
    judge = of_works(works)
    fetch = opero(cache=False, min_delay=0, retries=1, arg_fallback="account", secret=("account",))(
        face.of(lambda account: judge())
    )
    said = shown_by(fetch, face, [SECRET, SPARE])
    assert "s3cr3t" not in said
    assert "account[1]" in said


def test_a_secret_default_is_never_shown(face: Any) -> None:
    judge = of_works(False)

    def fetch(account: Any = (SECRET, SPARE), api_key: str = SECRET, *, token: str = SPARE) -> Any:
        return judge()

    decorated = opero(
        cache=False, min_delay=0, retries=1, arg_fallback="account", secret=("account",)
    )(face.of(fetch))
    assert "s3cr3t" not in shown_by(decorated, face)


def test_other_arguments_are_never_shown(face: Any) -> None:
    judge = of_works(False)
    fetch = opero(cache=False, min_delay=0, retries=1, arg_fallback="model")(
        face.of(lambda prompt, model, **more: judge())
    )
    said = shown_by(fetch, face, SECRET, ["a", "b"], extra=SPARE)
    assert "s3cr3t" not in said
    assert "model='b'" in said


def test_results_are_never_shown(face: Any) -> None:
    fetch = opero(cache=False, retries=0, retry_if_result=lambda r: True)(face.of(lambda: SECRET))
    with capture_events() as events:
        receipt = face.run(fetch.call)
    assert receipt.value == SECRET
    assert SECRET not in f"{receipt}{receipt!r}{events}"


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2-s3cr3t@example.com/path",
        "redis://:hunter2-s3cr3t@localhost:6379/0",
        "postgres+psycopg://me:hunter2@s3cr3t@db/x",
        "https://s3cr3t@example.com",
    ],
)
def test_user_info_of_urls_is_masked(face: Any, url: str) -> None:
    judge = of_works(False)

    def fetch(mirror: Any = (url, "https://example.org")) -> Any:
        return judge()

    decorated = opero(cache=False, min_delay=0, retries=1, arg_fallback="mirror")(face.of(fetch))
    said = shown_by(decorated, face)
    assert "s3cr3t" not in said
    assert "://***@" in said


def test_values_that_are_no_plain_text_show_their_type_only(face: Any) -> None:
    class Account:
        def __repr__(self) -> str:
            return SECRET

    judge = of_works(False)
    fetch = opero(cache=False, min_delay=0, retries=1, arg_fallback="account")(
        face.of(lambda account: judge())
    )
    said = shown_by(fetch, face, [Account(), {"password": SECRET}])
    assert "s3cr3t" not in said
    assert "account[0]: Account" in said
    assert "account[1]: dict" in said


def test_a_value_that_opero_refuses_is_not_shown(face: Any) -> None:
    fetch = opero(arg_fallback="api_key")(face.of(lambda prompt, api_key: None))
    with pytest.raises(TypeError) as caught:
        face.run(fetch, SECRET, [])
    assert SECRET not in str(caught.value)
