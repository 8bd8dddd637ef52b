"""The images in a request."""

from typing import NamedTuple

from fastapi import HTTPException, Request
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

BYTES, FORM = "application/octet-stream", "multipart/form-data"
LONGEST_NAME = 255
FIELDS = 16  # that a form may have besides its images; none is used


class Upload(NamedTuple):
    """An image and the client's name for it, which is never used to open anything."""

    name: str
    content: bytes


async def receive(request: Request, limit: int) -> list[Upload]:
    """Receives the images of a request, at least one and at most `limit`.

    Raises:
        HTTPException: 400 a malformed form, 413 too many images, 415 another content type, 422 no image.
    """
    content_type, options = parse_options_header(request.headers.get("content-type", BYTES))
    kind = content_type.decode("latin-1")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Send the body as it is, without a Content-Encoding.")
    if kind == FORM:
        uploads = await _form(request, options.get(b"boundary", b""), limit)
    elif kind.startswith((BYTES, "image/")):
        uploads = [Upload("", content)] if (content := await request.body()) else []
    else:
        raise HTTPException(415, f"Send one image as the body, with the type {BYTES}, or several as {FORM}.")
    if not uploads:
        raise HTTPException(422, "There is no image in this request.")
    if len(uploads) > limit:
        raise HTTPException(413, f"At most {limit} images in a request.")
    return uploads


async def _form(request: Request, boundary: bytes, limit: int) -> list[Upload]:
    """The files of a form, which stay in memory: Starlette's own parser writes the larger ones to the disk."""
    uploads, parts, ends = list[Upload](), list[Field | File](), list[bool]()

    def on_part(part: Field | File) -> None:
        parts.append(part)
        if len(parts) > limit + FIELDS:
            raise HTTPException(413, f"At most {limit} images in a request.")
        if isinstance(part, File):
            part.file_object.seek(0)
            name = (part.file_name or b"").decode(errors="replace")[-LONGEST_NAME:]
            uploads.append(Upload(name, part.file_object.read()))

    try:
        config = {"MAX_MEMORY_FILE_SIZE": float("inf")}
        parser = FormParser(FORM, on_part, on_part, lambda: ends.append(True), boundary, config=config)
        async for chunk in request.stream():
            parser.write(chunk)
    except FormParserError as error:
        raise HTTPException(400, "The form is malformed.") from error
    if not ends:
        raise HTTPException(400, "The form ends before its last boundary.")
    return uploads
