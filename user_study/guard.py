"""What every request passes: a limit on its body, security headers on its answer, limits on how often it may come."""

from __future__ import annotations

import time

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 * 1024
WRITES_PER_RATER = RateLimitItemPerMinute(180)  # votes and undos; nobody looks at three pairs a second
JOINS_PER_ADDRESS = RateLimitItemPerMinute(120)  # a class behind one address may join at once
BAD_LINKS_PER_ADDRESS = RateLimitItemPerMinute(30)

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    # the page is Gradio's, which compiles scripts and sets styles as it runs; nothing comes from elsewhere
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    ),
)


class Guard:
    """Refuse large bodies before anything reads them, and send the same security headers with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 411 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                message["headers"] = [*headers, *(header for header in _HEADERS if header[0] not in present)]
            await send(message)

        status = _body_status(dict(scope["headers"]))
        app = self._app if status is None else JSONResponse({"error": "too-large"}, status)
        await app(scope, receive, send_guarded)


class RateLimits:
    """How often each rater or address may do a thing; counted in this process."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def check(self, limit: RateLimitItem, who: str) -> None:
        """Count one more; raises 429 with Retry-After when it is too often."""
        if not self._limiter.hit(limit, who):
            window = self._limiter.get_window_stats(limit, who)
            wait = max(1, round(window.reset_time - time.time()))
            raise HTTPException(429, "slow-down", {"Retry-After": str(wait)})


def _body_status(headers: dict[bytes, bytes]) -> int | None:
    """The status to refuse a request's body with, or None when its announced size is fine."""
    if b"transfer-encoding" in headers:
        return 411
    length = headers.get(b"content-length", b"0")
    return 413 if not length.isdigit() or int(length) > MAX_BODY_BYTES else None
