"""A request is answered in time, or not at all: when its client has gone, work for it ends."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response


class Clock:
    """Of one request.

    Attributes:
        is_working: Whether the request has come as a whole.
    """

    is_working = False

    async def answer(self, request: Request, work: Coroutine[Any, Any, Response]) -> Response:
        """The result of the work.

        Raises:
            ClientDisconnect: The client has gone before; the work is cancelled.
        """
        self.is_working = True
        task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def limited(seconds: float) -> AsyncIterator[Clock]:
    """Ends what takes longer.

    Raises:
        HTTPException: 408 while the request is still coming, 503 while it is worked on.
    """
    clock = Clock()
    try:
        async with asyncio.timeout(seconds):
            yield clock
    except TimeoutError as error:
        if clock.is_working:
            raise HTTPException(503, "There was no time for this request; come back.", {"Retry-After": "5"}) from error
        raise HTTPException(408, f"The request has not come within {seconds:g} seconds.") from error
