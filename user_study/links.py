"""Signed links and cookies: who a rater is, said by the browser and believed only with the study's signature."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from hashlib import sha256

from itsdangerous import BadData, URLSafeSerializer


class BadLink(Exception):
    """The link was not made by this study, or was changed."""


class ExpiredLink(Exception):
    """The link was good once."""


def make_link(key: bytes, expires: datetime, rater: str | None = None) -> tuple[str, str]:
    """A new rater's id and the token of the link that makes whoever opens it that rater."""
    rater = rater or secrets.token_hex(8)
    return rater, str(_signer(key, "link").dumps([rater, int(expires.timestamp())]))


def read_link(key: bytes, token: str, now: datetime | None = None) -> str:
    """The rater that a link's token stands for; raises BadLink or ExpiredLink."""
    try:
        rater, expires = _signer(key, "link").loads(token)
    except (BadData, ValueError, TypeError):
        raise BadLink from None
    if (now or datetime.now(UTC)).timestamp() > expires:
        raise ExpiredLink
    return str(rater)


def make_cookie(key: bytes, rater: str) -> str:
    """What the browser keeps of a rater."""
    return str(_signer(key, "cookie").dumps(rater))


def read_cookie(key: bytes, value: str) -> str | None:
    """The rater of a cookie; None for a forged one."""
    try:
        return str(_signer(key, "cookie").loads(value))
    except BadData:
        return None


def _signer(key: bytes, use: str) -> URLSafeSerializer:
    return URLSafeSerializer(key, salt=use, signer_kwargs={"digest_method": sha256, "key_derivation": "hmac"})
