"""Limits of every request: who may send it, its size, what a failure reveals; and a line of the log."""

import asyncio
import hmac
import logging
import time
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from project.serving.settings import Settings

OPEN = ("/", "/docs", "/healthz", "/openapi.json")  # need no token; neither does /static/
BODIES = 16  # of the largest size, held at once
DISCARD = 5  # seconds for which the rest of a refused request is still read
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
log = logging.getLogger(__name__)


class LimitsMiddleware:
    """Refuses what is too large or not allowed before it reaches the application.

    Args:
        app: The application.
        settings: The limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._held = 0  # bytes of all requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, size, complete = time.perf_counter(), 0, 0, False
        headers = Headers(scope=scope)

        async def limited_receive() -> Message:
            nonlocal size, complete
            message = await receive()
            complete = not message.get("more_body", False)
            length = len(message.get("body", b""))
            size, self._held = size + length, self._held + length
            if size > self._settings.max_body:
                raise self._too_large()
            if self._held > BODIES * self._settings.max_body:
                raise HTTPException(503, "Too many requests at once; retry later.", {"Retry-After": "1"})
            return message

        async def secure_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (complete or status == 408 or "expect" in headers):  # expect: the client waits before it sends
                    await _discard(receive)
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            if refusal := self._refusal(scope["path"], headers):
                response = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
                await response(scope, receive, secure_send)
            else:
                await self._app(scope, limited_receive, secure_send)
        except Exception:  # a bug; the client got a 500 without its traceback
            log.exception("A request has failed")
        finally:
            self._held -= size
            path = getattr(scope.get("route"), "path", "-")  # never what the client wrote
            client = scope["client"][0] if scope.get("client") else "-"
            milliseconds = 1000 * (time.perf_counter() - started)
            log.info("%s %s %s %d, %d bytes, %.0f ms", client, scope["method"][:8], path, status, size, milliseconds)

    def _refusal(self, path: str, headers: Headers) -> HTTPException | None:
        host, origin, token = headers.get("host", ""), headers.get("origin"), self._settings.token
        if self._settings.hosts and _hostname(host) not in self._settings.hosts:  # DNS rebinding
            return HTTPException(400, "This server does not answer to that host name.")
        is_foreign = origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")
        if is_foreign and token is None:
            return HTTPException(403, "Pages of other sites may not use this server.")
        if token is not None and not (path in OPEN or path.startswith("/static/")):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
                return HTTPException(401, "This server needs a token.", {"WWW-Authenticate": "Bearer"})
        return self._too_large() if int(headers.get("content-length", 0)) > self._settings.max_body else None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"A request may have at most {self._settings.max_body // 1_000_000} MB.")


def _hostname(host: str) -> str | None:
    with suppress(ValueError):  # a missing bracket
        return urlsplit(f"//{host}").hostname
    return None


async def _discard(receive: Receive) -> None:
    """Reads what the client still sends: if the connection closed earlier, the client would not see the response."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD):
            while (await receive()).get("more_body", False):
                pass
