# this_file: tests/utils/test_secrets.py
"""What opero may show of a value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opero.utils.secrets import looks_secret, mask_url, show_value


@pytest.mark.parametrize(
    "name",
    [
        *("key", "keys", "api_key", "apiKey", "APIKey", "OPENAI_API_KEY", "apikey", "key2_old"),
        *("token", "access_token", "accessTokens", "_token", "secret", "client_secret", "secrets"),
        *("password", "passwords", "passwd", "pwd", "db_pwd", "passphrase", "auth", "basic_auth"),
        *("authorization", "credential", "credentials", "cookie", "cookies", "dsn", "sentry_dsn"),
    ],
)
def test_a_name_with_such_a_word_is_secret(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "maxTokens", "min_tokens", "num_tokens", "n_tokens", "prompt_tokens"),
        *("completion_tokens", "input_tokens", "total_tokens", "author", "authors", "keyboard"),
        *("monkey", "tokenizer", "model", "x", "_", "secretary", "compass", "keyword", "données"),
    ],
)
def test_a_name_without_such_a_word_is_none(name: str) -> None:
    assert not looks_secret(name)


def test_a_declared_name_is_secret_whatever_it_is() -> None:
    assert looks_secret("model", ("model",))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgres://me:hunter2@db/x", "postgres://***@db/x"),
        ("redis://:hunter2@host:6379/0", "redis://***@host:6379/0"),
        ("https://token@host/path", "https://***@host/path"),
        ("postgres://me:p@ss@db/x", "postgres://***@db/x"),
        ("amqp+ssl://a:b@h", "amqp+ssl://***@h"),
        ("http://a:b@h, http://c:d@i", "http://***@h, http://***@i"),
        ("https://host/path@2x.png", "https://host/path@2x.png"),
        ("me@example.org", "me@example.org"),
        ("https://host:8080/x", "https://host:8080/x"),
    ],
)
def test_user_info_leaves_urls_and_nothing_else_changes(url: str, shown: str) -> None:
    assert mask_url(url) == shown


@given(
    st.text("abc123:@!$&", min_size=1, max_size=20),
    st.from_regex(r"[a-z]{1,9}(:[0-9]{2,4})?(/[a-z]{0,5})?", fullmatch=True),
)
def test_no_part_of_a_password_is_left(userinfo: str, rest: str) -> None:
    assert mask_url(f"https://{userinfo}@{rest}") == f"https://***@{rest}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("gpt-4", "model='gpt-4'"),
        (3, "model=3"),
        (2.5, "model=2.5"),
        (None, "model=None"),
        (True, "model=True"),
        ("https://me:pw@host/", "model='https://***@host/'"),
        ({"key": "sk-1"}, "model[1]: dict"),
        (b"sk-1", "model[1]: bytes"),
        (["sk-1"], "model[1]: list"),
        ("x" * 100, "model='" + "x" * 58 + "…"),
    ],
)
def test_a_plain_value_is_shown_and_of_others_the_type(value: object, shown: str) -> None:
    assert show_value("model", 1, value, secret=False) == shown


@given(st.one_of(st.text(min_size=4), st.integers(min_value=1000), st.binary(min_size=4)))
def test_a_secret_value_is_never_shown(value: object) -> None:
    assert show_value("api_key", 2, value, secret=True) == "api_key[2]"


def test_a_long_url_is_masked_before_it_is_cut() -> None:
    shown = show_value("url", 0, f"https://{'p' * 70}@host", secret=False)
    assert shown == "url='https://***@host'"
