# this_file: tests/utils/test_secrets.py
"""What opero may show of a value."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.tables import rows

from opero.utils.secrets import (
    hide,
    looks_secret,
    mask_text,
    mask_url,
    mask_urls,
    masked_repr,
    show_value,
)

pytestmark = pytest.mark.internal


@rows(
    "name",
    [
        *(
            "dbpass",
            "userpass",
            "privkey",
            "github_pat",
            "sharedaccesskey",
            "PHPSESSID",
            "jsessionid",
        ),
        *(
            "DATABASE_URI",
            "db_url",
            "hook_url",
            "card_number",
            "pincode",
        ),
        *("primary_api_key", "cache_key_secret", "sort_key_token", "keys_of_primary", "map_key"),
        *("key", "keys", "api_key", "apiKey", "APIKey", "OPENAI_API_KEY", "apikey", "key2_old"),
        *("token", "access_token", "accessTokens", "_token", "secret", "client_secret", "secrets"),
        *("password", "passwords", "passwd", "pwd", "db_pwd", "passphrase", "auth", "basic_auth"),
        *("authorization", "credential", "credentials", "cookie", "cookies", "dsn", "sentry_dsn"),
        *(
            "secretkey",
            "accesskey",
            "authtoken",
            "creds",
            "db_creds",
            "pw",
            "user_pw",
            "pin",
            "otp",
        ),
        *(
            "jwt",
            "bearer",
            "passcode",
            "pem",
            "sas",
            "sas_url",
            "signature",
            "session_id",
            "sessionid",
        ),
        *("connection_string", "connectionString", "database_url", "DATABASE_URL", "webhook_url"),
        *(
            "dbpassword",
            "clientsecret",
            "refreshtoken",
            "smtp_pass",
            "X-Api-Key",
            "X-Amz-Signature",
        ),
        *("redis_url", "MONGODB_URI", "celery_broker_url", "postgres_url", "rootpw", "access_code"),
        *("recovery_phrase", "one_time_code", "credit_card", "service_account_json", "pfx"),
        *("seed_phrase", "recovery_codes", "private_key_pem", "oauth2_token", "Set-Cookie", "pins"),
        *("new_passwords", "cached_credentials", "input_secrets", "new_cookies"),
    ],
)
def test_a_name_with_such_a_word_is_secret(name: str) -> None:
    assert looks_secret(name)


@rows(
    "name",
    [
        *("max_tokens", "maxTokens", "min_tokens", "num_tokens", "n_tokens", "prompt_tokens"),
        *("completion_tokens", "input_tokens", "total_tokens", "author", "authors", "keyboard"),
        *("monkey", "tokenizer", "model", "x", "_", "secretary", "compass", "keyword", "données"),
        *("max_new_tokens", "cached_tokens", "tokens_used", "tokens_per_minute", "tokens_limit"),
        *("token_count", "num_keys", "key_limit", "primary_key", "foreign_keys", "sortKey"),
        *("partition_key", "cache_key", "item_key", "PUBLIC_KEY", "primarykey", "idempotency-key"),
        *("pass_rate", "passing", "pin_memory", "pinned", "session", "database", "url", "powder"),
        *("spec", "code", "webpage", "design", "assign", "state", "authority", "hostname"),
    ],
)
def test_a_name_without_such_a_word_is_none(name: str) -> None:
    assert not looks_secret(name)


def test_a_declared_name_is_secret_whatever_it_is() -> None:
    assert looks_secret("model", ("model",))


@rows(
    ("url", "shown"),
    [
        ("postgres://me:hunter2@db/x", "postgres://***@db/x"),
        ("redis://:hunter2@host:6379/0", "redis://***@host:6379/0"),
        ("https:///me:hunter2@host/p", "https://***@host/p"),
        ("file:///home/logo@2x.png", "file:///home/logo@2x.png"),
        ("https://h/?to=https%3A%2F%2Fme%3Ahunter2%40i", "https://h/?to=https%3A%2F%2F***%40i"),
        ("https://hooks.slack.com/services/T0/B0/hunter2", "https://hooks.slack.com/services/***"),
        ("https://discord.com/api/webhooks/12/hunter2", "https://discord.com/api/webhooks/***"),
        ("https://api.telegram.org/bot12:hunter2/send", "https://api.telegram.org/bot***/send"),
        ("https://token@host/path", "https://***@host/path"),
        ("postgres://me:p@ss@db/x", "postgres://***@db/x"),
        ("amqp+ssl://a:b@h", "amqp+ssl://***@h"),
        ("http://a:b@h, http://c:d@i", "http://***@h, http://***@i"),
        ("https://host/path@2x.png", "https://host/path@2x.png"),
        ("me@example.org", "me@example.org"),
        ("https://host:8080/x", "https://host:8080/x"),
        ("redis://:a/hunter2@localhost/0", "redis://***@localhost/0"),
        ("redis:/:hunter2@localhost/0", "redis:/***@localhost/0"),
        ("redis//:hunter2@localhost/0", "redis//***@localhost/0"),
        ("rdis://u:hunter2@h/0", "rdis://***@h/0"),
        ("redis://:hun ter2@host/0", "redis://***@host/0"),
        ("https://me:p?x#y@host/", "https://***@host/"),
        ("postgresql://u:p/w?x@h/d", "postgresql://***@h/d"),
        ("user:pa:ss@db:5432", "***@db:5432"),
        ("https://host:8080/x?q=a@b", "https://host:8080/x?q=a@b"),
        ("git+https://host/repo@v1", "git+https://host/repo@v1"),
        ("sqlite:///C:/x@y", "sqlite:///C:/x@y"),
        ("mailto:me@example.org", "mailto:me@example.org"),
        ("12:30 me@example.org", "12:30 me@example.org"),
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


FIELDS = [
    *("api_key", "key", "access_token", "sig", "signature", "X-Amz-Signature", "password", "code"),
    *("client_secret", "sid", "jwt", "api%5Fkey", "X-Amz-Security-Token", "pw"),
]


@rows("mask", [mask_text, mask_url, mask_urls])
@rows("name", FIELDS)
def test_secret_fields_of_urls_are_masked_and_others_stay(name: str, mask: Any) -> None:
    for url in ("?page=7&{}&x=1", "?{}", "#{}", "?page=7#{}", "?a=1;{}"):
        text = f"GET https://host:80/p{url}, then more"
        assert mask(text.format(f"{name}=hunter2")) == text.format(f"{name}=***")


@rows(
    ("text", "shown"),
    [
        ("connect(api_key=b'hunter2', x=1)", "connect(api_key='***', x=1)"),
        ("password => hunter2", "password => ***"),
        ("[('x-api-key', 'hunter2'), ('a', 'b')]", "[('x-api-key', '***'), ('a', 'b')]"),
        ("(b'authorization', b'a \"hunter2')", "(b'authorization', b'***')"),
        ("('password', 'user', 'host')", "('password', 'user', 'host')"),
        ("Signature=9f86d081884c7d659a2f", "Signature=***"),
        ("sorted(x, key=len)", "sorted(x, key=len)"),
        ("Basic dXNlcjpodW50ZXIy", "Basic ***"),
        ("basic authentication failed", "basic authentication failed"),
        ("Digest mismatch", "Digest mismatch"),
        ("host=x password=hunter2 user=y", "host=x password=*** user=y"),
        ("mysql --password=hunter2 --host h", "mysql --password=*** --host h"),
        ("mysql --password hunter2 --host h", "mysql --password *** --host h"),
        ("['mysql', '--password', 'hunter2']", "['mysql', '--password', '***']"),
        (r"{\"token\": \"hunter2\", \"n\": 1}", r"{\"token\": ***, \"n\": 1}"),
        ("https://h/?user[password]=hunter2", "https://h/?user[password]=***"),
        ("Incorrect API key provided: hunter2.", "Incorrect API key provided: ***"),
        ("<auth><token>hunter2</token><n>1</n></auth>", "<auth><token>***</token><n>1</n></auth>"),
        ("use --max-tokens 5 --verbose", "use --max-tokens 5 --verbose"),
        ("{'password': 'hunter2', 'x': 1}", "{'password': '***', 'x': 1}"),
        ('{"api_key":"hunter2","mail":"a@b"}', '{"api_key":"***","mail":"a@b"}'),
        ("Authorization: Bearer hunter2hunter2", "Authorization: ***"),
        ("authorization: token hunter2\nHost: h", "authorization: ***\nHost: h"),
        ("Cookie: sid=hunter2; x=y", "Cookie: ***"),
        ("with bearer hunter2hunter2 refused", "with bearer *** refused"),
        ("sorted(key=len), cache_key=None", "sorted(key=len), cache_key=None"),
        ("key sk-proj-abcdefghijklmnop is wrong", "key *** is wrong"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----.", "***."),
        ("eyJhbGciOi.eyJzdWIiOi.c2ln", "***"),
        ("get(auth=('me', 'hunter2'), n=1)", "get(auth=***, n=1)"),
        ("{'token': ['a', ')', {'b': 'hunter2'}], 'n': 1}", "{'token': ***, 'n': 1}"),
        ("{'token': ['a', 'hunter2", "{'token': ***"),
        (r"password='a\'hunter2', n=1", "password='***', n=1"),
        ("{'password': 'hunter2 and mor", "{'password': '***'"),
        ("keys=(1, 2), sig={3}", "keys=(1, 2), sig={3}"),
        ("https://h/?next=https%3A%2F%2Fi%2F%3Ftoken%3Dhunter2%26n%3D1", "https://h/?next=https%3A%2F%2Fi%2F%3Ftoken%3D***%26n%3D1"),
        ("https://h/?api%255Fkey=hunter2&n=1", "https://h/?api%255Fkey=***&n=1"),
        ("openaikey=hunter2 monkey=banana", "openaikey=*** monkey=banana"),
        ("KeyError: 'name'", "KeyError: 'name'"),
        ("primary_key=id, foreign key: id", "primary_key=id, foreign key: id"),
        ("curl -u me:hunter2 https://h:80/x", "curl -u *** https://h:80/x"),
        ("curl -sSu 'me:hun ter2' --url h", "curl -sSu '***' --url h"),
        ("curl -ume:hunter2 -U p:hunter2 h", "curl -u*** -U *** h"),
        ("curl --user=me:hunter2 --proxy-user me:hunter2 h", "curl --user=*** --proxy-user *** h"),
        ("['curl', '-u', 'me:hunter2', 'https://h:80']", "['curl', '-u', '***', 'https://h:80']"),
        ("curl -u me -L https://h:80 -o x:y", "curl -u me -L https://h:80 -o x:y"),
        ("docker run -u 1000:1000 image", "docker run -u 1000:1000 image"),
        ("nothing to hide: 3 of 4", "nothing to hide: 3 of 4"),
    ],
)  # fmt: skip
def test_texts_of_other_code_are_masked(text: str, shown: str) -> None:
    assert mask_text(text) == mask_text(shown) == shown


def test_sentences_of_opero_keep_names_of_options() -> None:
    assert mask_urls("write cache_key=str or token: x") == "write cache_key=str or token: x"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("redis://:hunter2@h", "'redis://***@h'"),
        ({"token": "hunter2", "n": 1}, "{'token': '***', 'n': 1}"),
        (["u:hunter2@h"], "['***@h']"),
        (("https://h?sig=hunter2",), "('https://h?sig=***',)"),
        ((), "()"),
        (3, "3"),
        (None, "None"),
    ],
)
def test_the_repr_of_a_value_is_masked_at_every_depth(value: object, shown: str) -> None:
    assert masked_repr(value) == shown


@given(st.text(min_size=5, max_size=20), st.binary(max_size=8), st.binary(max_size=8))
def test_a_known_secret_is_hidden_in_every_encoding(
    secret: str, before: bytes, after: bytes
) -> None:
    assume(not secret.isspace() and "***" not in secret)
    data = before + secret.encode() + after
    for text in (
        secret,
        quote(secret),
        json.dumps({"x": secret}),
        repr(secret.encode()),
        data.hex(),
        base64.b64encode(data).decode(),
        base64.urlsafe_b64encode(data).decode(),
    ):
        shown = hide(text, [secret])
        assert "***" in shown


@given(st.text(max_size=60))
def test_masking_is_stable_and_never_raises(text: str) -> None:
    for mask in (mask_text, mask_url, mask_urls):
        assert mask(mask(text)) == mask(text)


@given(st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="/?#"), max_size=20))
def test_whatever_the_user_info_is_it_goes(userinfo: str) -> None:
    assert (
        mask_url(f"at https://{userinfo}@host/path?q=a@b now")
        == "at https://***@host/path?q=a@b now"
    )
