"""From a request to the pictures that it brings."""

from typing import Any, NamedTuple

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

RAW = ("application/octet-stream", "image/")  # what a body that is one picture says of itself
FORM = "multipart/form-data"
LONGEST_NAME = 255
FIELDS = 16  # of a form, besides its files: none is needed


class Upload(NamedTuple):
    """A picture as it came.

    Attributes:
        name: That the client gave it; never used to open anything.
        content: Its bytes.
    """

    name: str
    content: bytes


async def received(request: Request, most: int) -> list[Upload]:
    """The pictures of a request, at least one and at most so many.

    Raises:
        HTTPException: 400 a form that is damaged, 413 too many, 415 another type of content, 422 none.
    """
    kind = request.headers.get("content-type", RAW[0]).partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Send the body as it is, without a Content-Encoding.")
    if kind == FORM:
        found = await _files(request, most)
    elif kind.startswith(RAW):
        found = [Upload("", content)] if (content := await request.body()) else []
    else:
        raise HTTPException(415, f"Send one picture as the body, with the type {RAW[0]}, or several as {FORM}.")
    if not found:
        raise HTTPException(422, "There is no picture in this request.")
    return found


class _Form(MultiPartParser):
    """Keeps files in memory: a request has a largest size, and nothing is written to a disk."""

    spool_max_size = 0
    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True


async def _files(request: Request, most: int) -> list[Upload]:
    parser: Any = _Form(request.headers, request.stream(), max_files=most, max_fields=FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        is_many = error.message.startswith("Too many files")
        raise HTTPException(413 if is_many else 400, _told(error.message, most)) from error
    if not parser.is_whole:
        raise HTTPException(400, "The form ends before its last boundary.")
    parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
    return [Upload((part.filename or "")[-LONGEST_NAME:], await part.read()) for part in parts]


def _told(message: str, most: int) -> str:
    return f"At most {most} pictures in a request." if "files" in message else "The form is damaged."
