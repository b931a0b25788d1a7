# this_file: src/opero/caching/codec/signed.py
"""Pickles that are opened only if this user, or a host that shares the secret, has written them."""

from __future__ import annotations

import hmac
import pickle
from hashlib import blake2b
from typing import Any, Final

from opero.caching.codec.secret import find_secret
from opero.caching.codec.signals import Buffer, Undecodable, Unencodable

__all__ = ["SIGNATURE_SIZE", "read", "write"]

SIGNATURE_SIZE: Final = 32
"""Bytes of a signature: BLAKE2b with a key (RFC 7693)."""

_PROTOCOL: Final = 5
"""Known to every Python that opero runs on, so that entries survive a change of version."""


def write(value: Any, context: bytes, *, shared: bool) -> tuple[bytes, bytes]:
    """Pickle a value and return its signature and the pickle.

    Args:
        value: The value.
        context: What the entry belongs to; the signature covers it too.
        shared: Whether other hosts read what is written.

    Raises:
        Unencodable: It cannot be pickled, or there is no secret to sign it with.
    """
    kind = type(value).__qualname__
    secret, why = find_secret(shared=shared)
    if secret is None:
        raise Unencodable(f"its result ({kind}) is no plain data, and {why}")
    try:
        data = pickle.dumps(value, _PROTOCOL)
    except Exception as error:
        raise Unencodable(
            f"its result ({kind}) cannot be pickled ({type(error).__name__})"
        ) from error
    return _sign(secret, context, data), data


def read(signature: Buffer, data: Buffer, context: bytes, *, shared: bool) -> Any:
    """Check the signature of a pickle, and only then open it.

    Raises:
        Undecodable: The signature does not fit, or the pickle does not open.
    """
    secret, why = find_secret(shared=shared)
    if secret is None:
        raise Undecodable(f"it is signed, and {why}")
    if not hmac.compare_digest(_sign(secret, context, data), signature):
        raise Undecodable(
            "its signature does not fit: another secret, another key, or tampered with"
        )
    try:
        return pickle.loads(data)  # noqa: S301 - nobody else can have signed it
    except Exception as error:
        raise Undecodable(f"its pickle does not open ({type(error).__name__})") from error


def _sign(secret: bytes, context: bytes, data: Buffer) -> bytes:
    signer = blake2b(key=secret, digest_size=SIGNATURE_SIZE, person=b"opero.cache.1")
    signer.update(len(context).to_bytes(8, "little"))
    signer.update(context)
    signer.update(data)
    return signer.digest()
