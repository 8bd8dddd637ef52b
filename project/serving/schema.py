"""The responses, as /openapi.json describes them."""

from typing import Any

from fastapi import Response
from pydantic import BaseModel


class ClassProbability(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Prediction(BaseModel):
    """The prediction for one image; for an unreadable image, all fields but name and error are null."""

    name: str
    error: str | None = None
    label: str | None = None
    probability: float | None = None
    abstained: bool | None = None
    top: list[ClassProbability] | None = None
    probabilities: list[float] | None = None


class Predictions(BaseModel):
    """The predictions for the images of a request, in their order; probabilities are in the order of class_names."""

    model: str
    calibrated: bool
    class_names: list[str]
    predictions: list[Prediction]


class Failure(BaseModel):
    """Why a request was refused, in a sentence."""

    detail: str


def request(images: dict[str, Any]) -> dict[str, Any]:
    """Describes a request with one image as the body, or with `images` in a form."""
    form = {"type": "object", "properties": {"images": images}, "required": ["images"]}
    content = {"multipart/form-data": {"schema": form}, "application/octet-stream": {"schema": IMAGE}}
    return {"requestBody": {"required": True, "content": content | {"image/*": {"schema": IMAGE}}}}


IMAGE = {"type": "string", "format": "binary"}
REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Failure, "description": "The request is refused; /docs lists the status codes"},
    "5XX": {"model": Failure, "description": "The server cannot answer now, or not at all"},
}
# Arguments of the routes.
PREDICT: dict[str, Any] = {
    "responses": REFUSED | {422: {"model": Predictions | Failure, "description": "No readable image"}},
    "openapi_extra": request({"type": "array", "items": IMAGE, "minItems": 1}),
    "response_model": Predictions,
}
EXPLAIN: dict[str, Any] = {
    "responses": REFUSED | {200: {"description": "A PNG", "content": {"image/png": {"schema": IMAGE}}}},
    "openapi_extra": request(IMAGE),
    "response_class": Response,
}
