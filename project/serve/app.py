"""The application: what can be asked, and what is answered."""

import asyncio
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from string import Template
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from project.data.images import ImageError
from project.errors import UserError
from project.serve import Settings, timing, uploads
from project.serve.batching import Batcher, Full
from project.serve.model import Model
from project.serve.schema import EVERY, MAP, REFUSALS, UNREADABLE, Answer, Answers, Health, Likely, body, refusals
from project.serve.uploads import Upload

STATIC = Path(__file__).with_name("static")
GONE = 499  # nginx's number for it
EXPLANATION = 16  # places in the queue: it takes as long as so many pictures


def build(model: Model, settings: Settings) -> FastAPI:
    """Makes the application."""
    # a folder's name that is no text in UTF-8 is shown by its bytes
    names = [name.encode(errors="backslashreplace").decode() for name in model.predictor.class_names]
    batcher = Batcher(
        model.read,
        model.predictor.probabilities,
        settings.batch_size,
        settings.batch_wait,
        settings.queue,
        settings.threads,
        settings.parallel,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        batcher.close()

    app = FastAPI(
        title="Image classification",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )

    async def said(upload: Upload) -> Answer:
        try:
            row = await batcher.probabilities(upload.content)
        except ImageError as error:
            return Answer(name=upload.name, error=error.reason)
        order = sorted(range(len(names)), key=row.__getitem__, reverse=True)
        best = row[order[0]]
        return Answer(
            name=upload.name,
            label=names[order[0]],
            probability=best,
            abstained=best < settings.min_confidence,
            top=[Likely(label=names[place], probability=row[place]) for place in order[: settings.top]],
            probabilities=row,
        )

    async def labelled(pictures: list[Upload]) -> Response:
        with batcher.admitted(len(pictures)):
            rows = await asyncio.gather(*map(said, pictures))
        answers = Answers(model=model.id, class_names=names, predictions=rows)
        is_any = any(row.error is None for row in rows)
        return Response(answers.model_dump_json(), 200 if is_any else 422, media_type="application/json")

    async def explained(picture: Upload, target: str | None) -> Response:
        with batcher.admitted(min(EXPLANATION, settings.queue)):
            await asyncio.to_thread(model.network)
            try:
                index = None if target is None else names.index(target)
                png = await batcher.alone(partial(model.explanation, picture.content, index))
            except ImageError as error:
                raise HTTPException(422, f"This picture cannot be used: {error.reason}.") from error
            except UserError as error:
                raise HTTPException(501, "Grad-CAM cannot explain this network: it has no maps at its end.") from error
        return Response(png, media_type="image/png")

    @app.post("/predict", responses=REFUSALS | UNREADABLE, openapi_extra=body(many=True), response_model=Answers)
    async def predict(request: Request) -> Response:
        """Labels the pictures of a request: one as the body, or several as the files of a form."""
        async with timing.limited(settings.timeout) as clock:
            pictures = await uploads.received(request, settings.max_images)
            return await clock.answer(request, labelled(pictures))

    @app.post("/explain", responses=REFUSALS | MAP, openapi_extra=body(many=False), response_class=Response)
    async def explain(
        request: Request, target: Annotated[str | None, Query(description="A class; by default the likeliest")] = None
    ) -> Response:
        """Draws over one picture what speaks for a class."""
        if model.unexplained is not None:
            raise HTTPException(501, model.unexplained)
        if target is not None and target not in names:
            raise HTTPException(422, "The target is not one of the classes.")
        async with timing.limited(settings.timeout) as clock:
            (picture,) = await uploads.received(request, 1)
            return await clock.answer(request, explained(picture, target))

    @app.get("/healthz", responses=EVERY | refusals(_503="A picture is read, or a batch computed, without end"))
    async def healthz() -> Health:
        """Says that it answers."""
        if batcher.busy() > settings.timeout:
            raise HTTPException(503, "Some work has taken longer than a request may.", {"Retry-After": "60"})
        return Health(status="ok")

    files = {file.name: file.read_bytes() for file in STATIC.iterdir()}
    filled = Template(files.pop("page.html").decode()).substitute(
        explains=str(model.unexplained is None).lower(),
        token=str(settings.token is not None).lower(),
        megabytes=settings.max_body // 1_000_000,
    )
    docs = files.pop("docs.html")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(filled, media_type="text/html")

    @app.get("/docs", include_in_schema=False)
    async def description() -> Response:
        return Response(docs, media_type="text/html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "There is no such file.")
        return Response(files[name], media_type=mimetypes.guess_type(name)[0])

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        detail = "As many pictures wait as may; come back."
        return JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=GONE)  # for the log: nobody is there to read it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "The server has failed on this request."}, 500)

    return app
