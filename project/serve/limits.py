"""What no request gets past: its size, who may ask, and what is told of a failure."""

import asyncio
import hmac
import logging
import time
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from project.serve import Settings

LARGEST_HEAD = 16_384  # bytes of a request's line and headers
OPEN = ("/", "/docs", "/healthz", "/openapi.json")  # what is answered without a token, besides /static/
BODIES = 16  # of the largest size, held at once
DISCARDED = 4  # times the largest size, which is still read so that the client sees why it is refused
TOO_SLOW = 408
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
log = logging.getLogger(__name__)


class Guard:
    """Stands before the application.

    Args:
        app: The application.
        settings: Its limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._held = 0
        self.is_ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, taken, is_whole = time.perf_counter(), 0, 0, False
        waits = "expect" in Headers(scope=scope)  # it sends nothing before it is told to

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not (is_whole or status == TOO_SLOW or waits):
                    await _discard(receive, DISCARDED * self._settings.max_body)
                closing = [(b"connection", b"close")] if self.is_ending else []
                message = {**message, "headers": [*message["headers"], *HEADERS, *closing]}
            await send(message)

        async def limited() -> Message:
            nonlocal taken, is_whole
            message = await receive()
            is_whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            taken, self._held = taken + size, self._held + size
            if taken > self._settings.max_body:
                raise self._too_large()
            if self._held > BODIES * self._settings.max_body:
                raise HTTPException(503, "Too many requests at once; come back.", {"Retry-After": "1"})
            return message

        try:
            if refusal := self._refusal(scope):
                error = JSONResponse({"detail": refusal.detail}, refusal.status_code, refusal.headers)
                await error(scope, receive, answer)
            else:
                await self._app(scope, limited, answer)
        except Exception:  # a defect of ours, of which the client has been told without its place
            log.exception("A request has failed")
        finally:
            self._held -= taken
            place = getattr(scope.get("route"), "path", "-")  # what the client wrote may be anything
            client = scope["client"][0] if scope.get("client") else "-"
            took = 1000 * (time.perf_counter() - started)
            log.info("%s %s %s %d, %d bytes, %.0f ms", client, scope["method"][:8], place, status, taken, took)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        headers, settings = Headers(scope=scope), self._settings
        line = len(scope["raw_path"]) + len(scope["query_string"])
        if line + sum(len(name) + len(value) for name, value in scope["headers"]) > LARGEST_HEAD:
            return HTTPException(431, f"The headers of a request may have at most {LARGEST_HEAD:,} bytes.")
        host, origin = headers.get("host", ""), headers.get("origin")
        if settings.hosts and _name(f"//{host}") not in settings.hosts:
            return HTTPException(400, "This server does not answer to that host name.")  # rebinding of names
        is_foreign = origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")
        if is_foreign and settings.token is None:
            return HTTPException(403, "Pages of other sites may not ask this server.")
        if settings.token is not None and not (scope["path"] in OPEN or scope["path"].startswith("/static/")):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), settings.token.encode()):
                return HTTPException(401, "This server asks for a token.", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        return self._too_large() if length.isdecimal() and int(length[:20]) > settings.max_body else None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"A request may have at most {self._settings.max_body // 1_000_000} MB.")


def _name(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # a bracket too few
        return ""


async def _discard(receive: Receive, most: int) -> None:
    """Reads what a client is still sending: a connection that is closed before that hides the answer from it."""
    try:
        async with asyncio.timeout(5):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
