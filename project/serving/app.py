"""The server: its routes, what it accepts, and uvicorn around them."""

import asyncio
import hmac
import socket
from collections.abc import Callable, Coroutine, MutableMapping
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated, Any, NamedTuple

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from python_multipart.exceptions import FormParserError
from starlette.requests import ClientDisconnect

from project.data.images import ImageError
from project.errors import UserError
from project.serving import schema
from project.serving.batching import Batcher
from project.serving.model import Model
from project.serving.settings import Settings

STATIC = Path(__file__).with_name("static")
BYTES, FORM = "application/octet-stream", "multipart/form-data"
BODIES = 16  # of the largest size, held at once
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Upload(NamedTuple):
    """An image and the client's name for it, which is never used to open anything."""

    name: str
    content: bytes


class Routes:
    """The routes, whose docstrings are their descriptions in /openapi.json."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings
        # a folder name that is not valid UTF-8 is shown by its bytes
        self._class_names = [name.encode(errors="backslashreplace").decode() for name in model.predictor.class_names]
        self._batcher = Batcher(model.read, model.predictor.probabilities, settings)
        self._images = self._bytes = 0  # of all requests in progress
        self._page = Template((STATIC / "page.html").read_text(encoding="utf-8")).substitute(
            explains=str(model.unexplained is None).lower(),
            token=str(settings.token is not None).lower(),
            megabytes=settings.max_body // 1_000_000,
            calibration=model.predictor.metadata.calibration.capitalize(),
        )

    async def page(self) -> Response:
        return HTMLResponse(self._page)

    async def docs(self) -> Response:
        return FileResponse(STATIC / "docs.html")

    async def healthz(self) -> dict[str, str]:
        """Whether the server is healthy."""
        if self._batcher.busy() > self._settings.timeout:
            raise HTTPException(503, "Some work has taken longer than the timeout.", {"Retry-After": "60"})
        return {"status": "ok"}

    async def predict(self, request: Request) -> Response:
        """Classifies the images of a request: one as the body, or several as the files of a form."""
        return await self._answer(request, self._settings.max_images, self._predictions)

    async def explain(
        self,
        request: Request,
        target: Annotated[str | None, Query(description="A class; by default the predicted one")] = None,
    ) -> Response:
        """Draws a heat map over one image: the evidence for a class."""
        if self._model.unexplained is not None:
            raise HTTPException(501, self._model.unexplained)
        if target is not None and target not in self._class_names:
            raise HTTPException(422, "The target is not one of the classes.")
        index = None if target is None else self._class_names.index(target)
        return await self._answer(request, 1, partial(self._heat_map, index))

    async def require_token(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
    ) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), str(self._settings.token).encode()):
            raise HTTPException(401, "This server needs a token.", {"WWW-Authenticate": "Bearer"})

    async def _answer(
        self, request: Request, limit: int, work: Callable[[list[Upload]], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Receives at most `limit` images and works on them, within the limits of size, queue and time."""
        settings, size, images = self._settings, 0, list[Upload]()
        if int(request.headers.get("content-length", 0)) > settings.max_body:
            raise self._too_large()

        async def receive() -> MutableMapping[str, Any]:
            nonlocal size
            message = await request.receive()
            length = len(message.get("body", b""))
            size, self._bytes = size + length, self._bytes + length
            if size > settings.max_body:
                raise self._too_large()
            if self._bytes > BODIES * settings.max_body:
                raise HTTPException(503, "Too many requests at once; retry later.", {"Retry-After": "1"})
            return message

        try:
            async with asyncio.timeout(settings.timeout):
                received = await uploads(Request(request.scope, receive), limit)
                if self._images + len(received) > settings.queue:
                    raise HTTPException(503, "The queue is full; retry later.", {"Retry-After": "1"})
                images = received
                self._images += len(images)
                return await work(images)
        except (ClientDisconnect, FormParserError) as error:  # it is gone, or starlette is older than 1.7
            raise HTTPException(400, "The request is incomplete, or not a valid form.") from error
        except TimeoutError as error:
            sentence = f"The request took longer than {settings.timeout:g} seconds; retry later."
            raise HTTPException(503 if images else 408, sentence, {"Retry-After": "5"}) from error
        finally:
            self._images, self._bytes = self._images - len(images), self._bytes - size

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"A request may have at most {self._settings.max_body // 1_000_000} MB.")

    async def _predictions(self, images: list[Upload]) -> Response:
        rows = await asyncio.gather(*map(self._prediction, images))
        calibrated = bool(self._model.predictor.metadata.calibrated)
        content = schema.Predictions(
            model=self._model.id, calibrated=calibrated, class_names=self._class_names, predictions=rows
        )
        status = 200 if any(row.error is None for row in rows) else 422
        return Response(content.model_dump_json(), status, media_type="application/json")

    async def _prediction(self, image: Upload) -> schema.Prediction:
        try:
            row = await self._batcher.probabilities(image.content)  # (K,)
        except ImageError as error:
            return schema.Prediction(name=image.name, error=error.reason)
        names, order = self._class_names, sorted(range(len(row)), key=row.__getitem__, reverse=True)
        return schema.Prediction(
            name=image.name,
            label=names[order[0]],
            probability=row[order[0]],
            abstained=row[order[0]] < self._settings.min_confidence,
            top=[schema.ClassProbability(label=names[k], probability=row[k]) for k in order[: self._settings.top]],
            probabilities=row,
        )

    async def _heat_map(self, index: int | None, images: list[Upload]) -> Response:
        try:
            await asyncio.to_thread(self._model.network)  # loads a bundle's weights
            png = await self._batcher.run(self._model.explanation, images[0].content, index)
        except ImageError as error:
            raise HTTPException(422, f"This image cannot be used: {error.reason}.") from error
        except UserError as error:
            raise HTTPException(501, "Grad-CAM cannot explain this network: it has no spatial maps.") from error
        return Response(png, media_type="image/png")


async def uploads(request: Request, limit: int) -> list[Upload]:
    """The images of a request; HTTPException 400 a malformed form, 413 too many, 415 another content type, 422 none."""
    kind = request.headers.get("content-type", BYTES).lower()
    if kind.startswith(FORM):
        async with request.form(max_files=limit + 1000) as form:
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            images = [Upload(file.filename or "", await file.read()) for file in files]
    elif kind.startswith((BYTES, "image/")):
        images = [Upload("", content)] if (content := await request.body()) else []
    else:
        raise HTTPException(415, f"Send one image as the body, with the type {BYTES}, or several as {FORM}.")
    if not images:
        raise HTTPException(422, "There is no image in this request.")
    if len(images) > limit:
        raise HTTPException(413, f"At most {limit} images in a request.")
    return images


def listen(host: str, port: int) -> socket.socket:
    """Makes a listening socket."""
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    # the head and the body of a response are two packets; the second must not wait until the first is acknowledged
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def server(model: Model, settings: Settings) -> uvicorn.Server:
    """Makes the server; its `run` takes a list with the listening socket."""
    routes = Routes(model, settings)
    app = FastAPI(title="Image classification", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    guard = [] if settings.token is None else [Depends(routes.require_token)]
    app.get("/", include_in_schema=False)(routes.page)
    app.get("/docs", include_in_schema=False)(routes.docs)
    app.get("/healthz", responses=schema.REFUSED)(routes.healthz)
    app.post("/predict", dependencies=guard, **schema.PREDICT)(routes.predict)
    app.post("/explain", dependencies=guard, **schema.EXPLAIN)(routes.explain)
    app.mount("/static", StaticFiles(directory=STATIC))
    if settings.hosts:  # DNS rebinding: another site's name may point to this machine
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.hosts, www_redirect=False)
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        log_config=None,
        headers=list(HEADERS.items()),
        server_header=False,
        proxy_headers=False,
        limit_concurrency=500,  # connections
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        h11_max_incomplete_event_size=16_384,  # bytes of a request's line and headers
    )
    return uvicorn.Server(config)
