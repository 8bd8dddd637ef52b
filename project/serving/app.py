"""The routes of the server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

from project.data.images import ImageError
from project.errors import UserError
from project.serving import schema, uploads
from project.serving.batching import Batcher, QueueFull
from project.serving.model import Model
from project.serving.settings import Settings
from project.serving.uploads import Upload

STATIC = Path(__file__).with_name("static")
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it
EXPLANATION = 16  # images that a heat map counts as in the queue: it takes about as long


class Routes:
    """The routes, whose docstrings are their descriptions in /openapi.json.

    Args:
        model: The classifier.
        settings: The limits.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings
        # a folder name that is not valid UTF-8 is shown by its bytes
        self._class_names = [name.encode(errors="backslashreplace").decode() for name in model.predictor.class_names]
        self._batcher = Batcher(model.read, model.predictor.probabilities, settings)
        self._page = Template((STATIC / "page.html").read_text(encoding="utf-8")).substitute(
            explains=str(model.unexplained is None).lower(),
            token=str(settings.token is not None).lower(),
            megabytes=settings.max_body // 1_000_000,
        )

    async def page(self) -> Response:
        return HTMLResponse(self._page)

    async def docs(self) -> Response:
        return FileResponse(STATIC / "docs.html")

    async def healthz(self) -> schema.Health:
        """Whether the server is healthy."""
        if self._batcher.busy() > self._settings.timeout:
            raise HTTPException(503, "Some work has taken longer than the timeout.", {"Retry-After": "60"})
        return schema.Health(status="ok")

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

    async def close(self) -> None:
        self._batcher.close()

    async def _answer(
        self, request: Request, limit: int, work: Callable[[list[Upload]], Coroutine[Any, Any, Response]]
    ) -> Response:
        """Receives at most `limit` images and works on them, within the timeout and while the client is connected."""
        images = None
        try:
            async with asyncio.timeout(self._settings.timeout):
                images = await uploads.receive(request, limit)
                return await _while_connected(request, work(images))
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the log: the client does not read it
        except QueueFull as error:
            raise HTTPException(503, "The queue is full; retry later.", {"Retry-After": "1"}) from error
        except TimeoutError as error:
            if images is None:
                raise HTTPException(408, f"The request took longer than {self._settings.timeout:g} seconds.") from error
            raise HTTPException(503, "The server is busy; retry later.", {"Retry-After": "5"}) from error

    async def _predictions(self, images: list[Upload]) -> Response:
        with self._batcher.admitted(len(images)):
            rows = await asyncio.gather(*map(self._prediction, images))
        content = schema.Predictions(model=self._model.id, class_names=self._class_names, predictions=rows)
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
        with self._batcher.admitted(min(EXPLANATION, self._settings.queue)):
            await asyncio.to_thread(self._model.network)  # loads a bundle's weights
            try:
                png = await self._batcher.run(partial(self._model.explanation, images[0].content, index))
            except ImageError as error:
                raise HTTPException(422, f"This image cannot be used: {error.reason}.") from error
            except UserError as error:
                raise HTTPException(501, "Grad-CAM cannot explain this network: it has no spatial maps.") from error
        return Response(png, media_type="image/png")


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, disconnected = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


def build(model: Model, settings: Settings) -> FastAPI:
    """Makes the application."""
    routes = Routes(model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await routes.close()

    async def failed(_: Request, error: Exception) -> Response:  # the middleware logs it
        return JSONResponse({"detail": "The server has failed on this request."}, 500)

    app = FastAPI(
        title="Image classification",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers={Exception: failed},
    )
    app.get("/", include_in_schema=False)(routes.page)
    app.get("/docs", include_in_schema=False)(routes.docs)
    app.get("/healthz", **schema.HEALTHZ)(routes.healthz)
    app.post("/predict", **schema.PREDICT)(routes.predict)
    app.post("/explain", **schema.EXPLAIN)(routes.explain)
    app.mount("/static", StaticFiles(directory=STATIC))
    return app
