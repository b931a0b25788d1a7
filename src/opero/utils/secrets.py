# this_file: src/opero/utils/secrets.py
"""Decide which names and texts are secret, and mask them before opero shows anything.

Three kinds of text are masked: values of names that look secret (`api_key[0]` instead of the value), parts of URLs
(user-info, and query or fragment fields with such names), and tokens with a well-known form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, Final, cast

MASK: Final = "***"

# --- names ------------------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORDS: Final = _words(
    """
    passcode passwort kennwort senha contrasena wachtwoord haslo pwd pw rootpw userpw adminpw dbpw pwhash dbpass
    userpass pgpass keypass storepass auth oauth authorization cred creds cookie dsn otp totp mfa jwt bearer pem pfx
    sas sig signature hmac csrf xsrf cvv cvc ssn iban mnemonic psk pincode accesscode samlresponse kubeconfig keyfile
    keytab keystore keyring netrc connectionstring connstr databaseurl dburl webhook webhookurl
    """
)
"""Words of a name that make it secret, also in the plural."""

_LAST_WORDS: Final = _words("pass pat pin")
"""Words that do so at the end of a name only: `smtp_pass`, `github_pat`, `pin`, but not `pass_rate`, `pin_memory`."""

_PARTS: Final = ("password", "passwd", "passphrase", "credential", "apikey", "sessid", "sessionid")
"""Parts of a word that make it secret: `dbpassword`."""

_ENDS: Final = ("token", "tokens", "secret", "secrets", "key", "keys")
"""Ends of a word that do: `authtoken`, `clientsecret`, `openaikey`."""

_OTHER_KEYS: Final = _words(
    """
    mon tur don hoc joc whis lac hot public primary foreign sort partition range cache item row group join lookup unique
    natural composite candidate surrogate routing idempotency dedup dedupe
    """
)
"""What stands before "key", in the same word or as the word before, where that does not: `monkey`, `primary_key`."""

_SERVERS: Final = _words(
    "connection database db redis mongo mongodb postgres postgresql mysql mariadb broker amqp rabbitmq jdbc hook"
)
"""Words before "url" or "uri": such addresses hold a password, or are secret as a whole."""

_CODES: Final = _words("pin recovery backup verification security access unlock time login")
"""Words before "code" that do."""

_PAIRS: Final = _words(
    """
    session-id connection-string conn-string conn-str connection-str card-number seed-phrase recovery-phrase
    credit-card service-account pass-phrase code-verifier client-assertion magic-link
    """
)
"""Pairs of neighbouring words that do."""

_CODE_NAMES: Final = _words("key keys keyerror sig signature")
"""Names that lines of code have, too: there a value must look like a key."""

_FIELDS: Final = _words("code sid")
"""Further names of URL fields that are secret there."""

_COUNTS: Final = _words("max min num n count total per limit")
"""Words beside a plural that make it a number: `max_keys`, `tokens_per_minute`."""

_KINDS_OF_TOKENS: Final = _words("prompt completion input output new cached reasoning used")
"""Words beside "tokens" that do: `tokens_used`. `cached_credentials` are secret."""

_WORD: Final = r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])"


def looks_secret(name: str, declared: Collection[str] = ()) -> bool:
    """Return whether values of this name must not be shown.

    Args:
        name: Name of a parameter, option, header, or URL field.
        declared: Names that the user declared secret.

    Example:
        >>> looks_secret("api_key"), looks_secret("accessTokens"), looks_secret("database_url")
        (True, True, True)
        >>> looks_secret("max_tokens"), looks_secret("author")
        (False, False)
    """
    if name in declared:
        return True
    words = [word.lower() for word in re.findall(_WORD, name)]
    for place, word in enumerate(words):
        beside = words[max(place - 1, 0) : place + 2]
        counted = (
            (word.endswith("s") and not _COUNTS.isdisjoint(beside))
            or (word == "tokens" and not _KINDS_OF_TOKENS.isdisjoint(beside))
            or beside[-1] in ("count", "limit")
            or (word in ("key", "keys") and beside[0] in _OTHER_KEYS)
        )
        if not counted and _is_secret_word(word):
            return True
        if place > 0 and _is_secret_pair(words[place - 1], word.removesuffix("s")):
            return True
    return bool(words) and bool(_LAST_WORDS & {words[-1], words[-1].removesuffix("s")})


@cache
def _is_secret_word(word: str) -> bool:
    if word in _WORDS or (word.endswith("s") and word[:-1] in _WORDS):
        return True
    if word.endswith(_ENDS):
        return word.removesuffix("s").removesuffix("key") not in _OTHER_KEYS
    return any(part in word for part in _PARTS)


def _is_secret_pair(first: str, second: str) -> bool:
    if second == "code":
        return first in _CODES
    return first in _SERVERS if second in ("url", "uri") else f"{first}-{second}" in _PAIRS


# --- texts ------------------------------------------------------------------------------------------------------------

_PATH_SCHEMES: Final = (
    r"(?i)(?:.*\+)?(?:https?|wss?|s3|gs|gcs|az|abfss?|file|sqlite|git|ssh|hg|svn)"
)
"""Schemes whose paths may hold an "@" without user-info before it: `https://host/logo@2x.png`."""


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """Compile when first used: importing opero must not pay for it."""
    return {
        "scheme": re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://"),
        # user:password@host without "://": a mistyped scheme, or none.
        "bare": re.compile(
            r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*(?::/+|/+(?=[^\s/@]*:)))?"
            r"(?P<user>[^\s'\"{}()\[\],;=@:/]*):(?P<password>[^\s'\"{}()\[\],;]+)@(?=[\w\[])"
        ),
        # ?name=value, &name=value, #name=value; --name value; and name=value or name: "value" elsewhere.
        "field": re.compile(
            r"(?P<before>[?&#;]|(?<![\w.%-])[\"']?(?P<flag>--)?)(?P<name>[A-Za-z_][\w.%~-]*(?:\[[\w.%~-]*\])*)"
            r"(?P<between>(?:\\*[\"'])?\s?(?:=>?\s?|:(?!//)\s?|(?(flag),?\s+|(?!))))"
            # The end of a text may have been cut off.
            r"(?P<value>\\+\"[^\"]*\"?|b?\"(?:[^\"\\]|\\.)*\"?|b?'(?:[^'\\]|\\.)*'?|[^&#;,\s'\"<>)}\]]+)",
            re.DOTALL,
        ),
        # The same within a value of a URL, encoded once or several times.
        "encoded": re.compile(
            r"(?P<before>%(?:25)*(?:3F|26|23|3B)|(?<![\w.%-]))(?P<name>[A-Za-z_](?:[\w.~-]|%(?:25)*(?:5[BDF]|2[DE]))*)"
            r"(?P<between>%(?:25)*3D)(?P<value>(?:(?!%(?:25)*26)[^&#;,\s'\"<>)}\]])+)",
            re.IGNORECASE,
        ),
        # Brackets, and the texts in which they do not count.
        "bracket": re.compile(r"[()\[\]{}]|\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL),
        # ("name", "value"), as lists of headers and parameters hold them.
        "pair": re.compile(
            r"(?P<before>[(\[]b?[\"'](?P<name>[\w.-]+)[\"'],\s?b?(?P<quote>[\"']))"
            r"(?P<value>(?:(?!(?P=quote)).)+)(?=(?P=quote)[)\]])"
        ),
        # API key provided: value; <name>value</name>
        "prose": re.compile(
            r"(?P<before>\b(?:api|access|secret) key(?: \w+)?:\s*)\S+", re.IGNORECASE
        ),
        # curl -u user:password, also as a list of arguments.
        "login": re.compile(
            r"(?P<before>(?<![\w-])(?:-\w*?[uU]|--(?:proxy-)?user)(?:[\"'],|=)?\s*(?P<quote>[\"'])?)"
            r"(?(quote)[^\"':]*:[^\"']*|[^\s\"':]+:[^\s\"']+)"
        ),
        # A URL within a URL.
        "quoted": re.compile(r"(?<=%3A%2F%2F)[^\s&]+?(?=%40)", re.IGNORECASE),
        "element": re.compile(r"(?P<before><(?P<name>[\w:.-]+)>)[^<>]+(?=</(?P=name)>)"),
        "authorization": re.compile(
            # After the last three stands base64, or a field; "basic authentication" is prose.
            r"\b(?P<kind>bearer|(?:basic|digest|negotiate)(?=\s+\S*(?-i:[A-Z\d=])))(?P<space>\s+)"
            r"[\w.~+/=:-]{4,}",
            re.IGNORECASE,
        ),
        "token": re.compile(
            r"\b(?:sk|rk|pk)[-_][\w-]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
            r"|\bxox[abeoprs]-[\w-]{8,}|\bA[KS]IA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{16,}"
            r"|(?<=hooks\.slack\.com/services/)[\w/-]+|(?<=/api/webhooks/)\d+/[\w-]+"
            r"|(?<=api\.telegram\.org/bot)[\w:-]+|\bnpm_\w{16,}|\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*"
            r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
        ),
    }


def mask_urls(text: str) -> str:
    """Mask what opero itself writes: user-info and secret fields of URLs in it, and well-known tokens.

    Example:
        >>> mask_urls("cache_key=str: 'redis://:hunter2@host' is no key")
        "cache_key=str: 'redis://***@host' is no key"
    """
    if "@" in text:
        text = _mask_user_info(text)
    if "%40" in text:
        text = _patterns()["quoted"].sub(MASK, text)
    if "=" in text:
        text = _mask_fields(text, only_urls=True)
    if "%" in text:
        text = _patterns()["encoded"].sub(_masked_encoded, text)
    return _patterns()["token"].sub(MASK, text)


def mask_text(text: str) -> str:
    """Mask a text of other code: as `mask_urls`, and fields, headers and dict entries with secret names.

    Example:
        >>> mask_text("GET https://me:hunter2@host/p?page=7&api_key=sk-1 token='abc'")
        "GET https://***@host/p?page=7&api_key=*** token='***'"
        >>> mask_text("no secret here")
        'no secret here'
    """
    text = _patterns()["authorization"].sub(rf"\g<kind>\g<space>{MASK}", text)
    if "=" in text or ":" in text or "--" in text:
        text = _patterns()["prose"].sub(rf"\g<before>{MASK}", _mask_fields(text))
    if '",' in text or "'," in text:
        text = _patterns()["pair"].sub(_masked_pair, text)
    if "curl" in text:
        text = _patterns()["login"].sub(rf"\g<before>{MASK}", text)
    if "</" in text:
        text = _patterns()["element"].sub(_masked_pair, text)
    return mask_urls(text)


def mask_url(text: str) -> str:
    """Mask a text that is one URL, or should be: as `mask_text` does, also where the password holds spaces.

    Example:
        >>> mask_url("postgres://me:hunter2@db/x")
        'postgres://***@db/x'
    """
    if " " in text and "@" in text and text.count("://") == 1:
        scheme = _patterns()["scheme"].match(text)
        userinfo, _, remainder = text.rpartition("@")
        if scheme and " " in userinfo and ":" in userinfo[scheme.end() :]:
            return mask_text(f"{scheme[0]}{MASK}@{remainder}")
    return mask_text(text)


def masked_repr(value: object, name: str = "") -> str:
    """Return the `repr` of a value, an option's for example, with secrets masked at every depth.

    Args:
        value: Any object.
        name: Its name, if it has one: a secret one hides texts.

    Example:
        >>> masked_repr({"url": "redis://:hunter2@host", "token": "abc"})
        "{'url': 'redis://***@host', 'token': '***'}"
    """
    if isinstance(value, str | bytes) and name and looks_secret(name):
        return f"{MASK!r}"
    if type(value) is str:
        return repr(mask_url(value))
    if type(value) is dict:
        inner = (f"{masked_repr(k)}: {masked_repr(v, str(k))}" for k, v in value.items())
        return f"{{{', '.join(inner)}}}"
    if type(value) in (list, tuple):
        parts = [masked_repr(item, name) for item in cast("list[Any]", value)]
        if type(value) is list:
            return f"[{', '.join(parts)}]"
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
    return mask_urls(repr(value))


def _mask_user_info(text: str) -> str:
    starts = [m.start() for m in _patterns()["scheme"].finditer(text)]
    parts = [text[: starts[0]] if starts else text]
    parts = [_patterns()["bare"].sub(_masked_bare, parts[0])]
    parts += [_mask_one_url(text[a:b]) for a, b in zip(starts, [*starts[1:], None], strict=False)]
    return "".join(parts)


def _mask_one_url(text: str) -> str:
    """Mask the user-info of a text that begins with a scheme and may go on after the URL."""
    scheme, remainder = text.split("://", 1)
    # A slash too many: `https:///me:hunter2@host`, which is no path.
    remainder = re.sub(r"^/+(?=[^\s/@:]*:[^\s/]*@)", "", remainder)
    word = re.split(r"\s", remainder, maxsplit=1)[0]
    after = _patterns()["bare"].sub(_masked_bare, remainder[len(word) :])
    host = re.split(r"[/?#]", word, maxsplit=1)[0]
    user, colon, port = host.partition(":")
    has_paths = re.fullmatch(_PATH_SCHEMES, scheme)
    within = word  # the password may hold "/", "?" or "#"
    if "@" in host:
        # Also one that holds "/" and "@": up to the query, in which an "@" may well stand.
        within = host if has_paths else re.split(r"[?#]", word, maxsplit=1)[0]
    elif has_paths and not (colon and (not user or not port.isdigit())):
        within = ""  # the "@" belongs to the path; a port is a number
    last = within.rfind("@")
    return f"{scheme}://{MASK}{word[last:]}{after}" if last >= 0 else f"{scheme}://{word}{after}"


def _masked_bare(match: re.Match[str]) -> str:
    scheme = match["scheme"] or ""
    if (scheme or match["user"]).lower().rstrip(":/") in ("mailto", "acct", "sip", "xmpp"):
        return match[0]
    return f"{scheme}{MASK}@"


def _masked_pair(match: re.Match[str]) -> str:
    return f"{match['before']}{MASK}" if looks_secret(match["name"]) else match[0]


def _masked_encoded(match: re.Match[str]) -> str:
    before, name, between = match["before"], match["name"], match["between"]
    return f"{before}{name}{between}{MASK}" if _names_secret_field(name) else match[0]


def _names_secret_field(name: str) -> bool:
    """Whether a field of a URL, perhaps encoded several times, has the name of a secret."""
    from urllib.parse import unquote

    for _ in range(_MOST_ENCODINGS):
        name = unquote(name)
    return looks_secret(name) or name.lower() in _FIELDS


def _mask_fields(text: str, *, only_urls: bool = False) -> str:
    done, place = "", 0
    while match := _patterns()["field"].search(text, place):
        if not _is_secret_field(match, only_urls=only_urls):
            # The value may hold another field.
            done += text[place : match.start("value")]
            place = match.start("value")
            continue
        value, end = match["value"], match.end()
        inner = value.removeprefix("b")
        quote = inner[0] if inner and inner[0] in "'\"" else ""
        if not quote and match["name"].lower().endswith(("authorization", "cookie")):
            line_end = text.find("\n", end)  # a header
            end = len(text) if line_end < 0 else line_end
        elif not quote and value.startswith(_BRACKETS):
            end = _end_of_bracket(text, match.start("value"))
        done += f"{text[place : match.start('value')]}{quote}{MASK}{quote}"
        place = end
    return done + text[place:]


def _end_of_bracket(text: str, start: int) -> int:
    """Return where a bracket ends that begins at `start`: the end of the text if it is cut off."""
    depth = 0
    for match in _patterns()["bracket"].finditer(text, start):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text)


def _is_secret_field(match: re.Match[str], *, only_urls: bool) -> bool:
    name, value = match["name"], match["value"]
    if value in ("None", "True", "False", "''", '""'):
        return False
    if match["before"] in ("?", "&", "#", ";") and match["between"] == "=":
        return _names_secret_field(name)
    # `key=len` in a line of code is no secret; `password=hunter2` in a connection string is.
    return (
        not only_urls
        and looks_secret(name)
        and (
            name.lower() not in _CODE_NAMES
            or re.fullmatch(r"(?=\D*\d)[\w+/=-]{16,}", value) is not None
        )
        and (bool(match["flag"]) or not value.startswith(("<", MASK)))
        and not (value.startswith(_BRACKETS) and name.lower() in _CODE_NAMES)
    )


_MOST_ENCODINGS: Final = 3
_BRACKETS: Final = ("(", "[", "{")


def show_value(name: str, index: int, value: object, *, secret: bool) -> str:
    """Return the label of a fallback value: `model='gpt-4'`, or `api_key[1]` where it is secret.

    Only plain scalars are shown; of anything else the type's name, because a `repr` may hold
    anything.
    """
    if secret:
        return f"{name}[{index}]"
    if not isinstance(value, str | int | float | bool | None):
        return f"{name}[{index}]: {type(value).__name__}"
    shown = repr(mask_url(value)) if isinstance(value, str) else f"{value!r}"
    return f"{name}={shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + '…'}"


_LONGEST: Final = 60


# --- known secrets ----------------------------------------------------------------------------------------------------


def hide(text: str, secrets: Iterable[str]) -> str:
    """Replace known secrets in a text, also where they are quoted for URLs, escaped, or encoded as base64 or hex.

    Args:
        text: Any text.
        secrets: The texts that must not be in it.

    Example:
        >>> hide("login hunter2, base64 bWU6aHVudGVyMg==", ["hunter2"])
        'login ***, base64 bWU6***'
    """
    forms = {form for secret in secrets if secret for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        if form in text:
            text = re.sub(rf"{re.escape(form)}(?:[\w+/-]?={{1,2}})?", MASK, text)
    return text


def _forms(secret: str) -> Iterable[str]:
    """Return a secret as it may stand in a text."""
    import base64
    import json
    from urllib.parse import quote, quote_plus

    data = secret.encode("utf-8", "surrogatepass")
    yield from (secret, quote(secret, safe=""), quote_plus(secret), quote(secret))
    yield from (json.dumps(secret)[1:-1], repr(secret)[1:-1], repr(data)[2:-1])
    yield from (data.hex(), data.hex().upper())
    if len(data) < _ENCODED:
        return
    for shift in range(3):
        # Base64 of a text with the secret in it: without the characters that its neighbours share.
        encoded = base64.b64encode(b"\0" * shift + data).decode()
        first = (0, 2, 3)[shift]
        last = len(encoded.rstrip("=")) - (1 if (shift + len(data)) % 3 else 0)
        inner = encoded[first:last]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")


_ENCODED: Final = 5
"""Bytes from which on a base64 form is long enough to be no part of other texts."""
