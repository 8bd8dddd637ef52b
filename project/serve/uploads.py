"""From a request to the pictures that it brings."""

import time
from typing import Any, NamedTuple, cast

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

RAW = ("application/octet-stream", "image/")  # what a body that is one picture says of itself
FORM = "multipart/form-data"
LONGEST_NAME = 255
CALLBACKS = (
    "on_part_begin",
    "on_header_field",
    "on_header_value",
    "on_header_end",
    "on_part_data",
    "on_part_end",
    "on_end",
)
LONGEST_PARSING = 0.5  # seconds of a core: pictures are skipped over, what is around them is read byte by byte
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


class _Files:
    """The files of a form, as it comes; kept in memory, since a request has a largest size.

    Args:
        boundary: What is between its parts.
        most: Files that it may have.
    """

    def __init__(self, boundary: bytes, most: int) -> None:
        self.found: list[Upload] = []
        self.is_whole = False
        self._most, self._parts = most, 0
        self._header = self._disposition = b""
        self._value, self._content = bytearray(), bytearray()
        callbacks = {name: getattr(self, f"_{name}") for name in CALLBACKS}
        self.parser = MultipartParser(boundary, cast(Any, callbacks))

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._most + FIELDS:
            raise HTTPException(413, "The form has too many parts.")
        self._disposition, self._content = b"", bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = b"", bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _on_part_end(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"filename")
        if name is None:  # a field, of which none is needed
            return
        if len(self.found) == self._most:
            raise HTTPException(413, f"At most {self._most} pictures in a request.")
        self.found.append(Upload(name.decode(errors="replace")[-LONGEST_NAME:], bytes(self._content)))

    def _on_end(self) -> None:
        self.is_whole = True


async def _files(request: Request, most: int) -> list[Upload]:
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    try:
        files, spent = _Files(boundary or b"", most), 0.0
        async for chunk in request.stream():
            started = time.thread_time()
            files.parser.write(chunk)
            spent += time.thread_time() - started
            if spent > LONGEST_PARSING:
                raise HTTPException(400, "The form is damaged: too much of it is neither names nor pictures.")
    except FormParserError as error:
        raise HTTPException(400, "The form is damaged.") from error
    if not files.is_whole:
        raise HTTPException(400, "The form ends before its last boundary.")
    return files.found
