"""What is answered, and how it is described at /openapi.json."""

from typing import Any

from pydantic import BaseModel


class Likely(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Answer(BaseModel):
    """What is said of one picture; all but name and error is null where it cannot be read."""

    name: str
    error: str | None = None
    label: str | None = None
    probability: float | None = None
    abstained: bool | None = None
    top: list[Likely] | None = None
    probabilities: list[float] | None = None


class Answers(BaseModel):
    """What is said of a request's pictures, in their order; probabilities are in the order of class_names."""

    model: str
    class_names: list[str]
    predictions: list[Answer]


class Health(BaseModel):
    """That the server answers."""

    status: str


class Failure(BaseModel):
    """Why a request was refused, in a sentence."""

    detail: str


def refusals(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """Descriptions by status; each is given with an underscore before it."""
    return {int(status[1:]): {"model": Failure, "description": reason} for status, reason in reasons.items()}


EVERY = refusals(
    _400="The request is damaged, or for another host",
    _403="From a page of another site",
    _431="Too many bytes of headers",
)
REFUSALS = EVERY | refusals(
    _401="The token is missing or wrong",
    _408="The request came too slowly",
    _413="Too many bytes or pictures",
    _415="Neither a picture nor a form",
    _503="Too many wait; Retry-After says when to come back",
)
UNREADABLE: dict[int | str, dict[str, Any]] = {
    422: {"model": Answers | Failure, "description": "There is no picture, or none that can be read"}
}
PICTURE = {"type": "string", "format": "binary"}
MAP = refusals(
    _422="There is no picture, it cannot be read, or there is no such class", _501="This server draws no heat maps"
) | {200: {"description": "A PNG", "content": {"image/png": {"schema": PICTURE}}}}


def body(many: bool) -> dict[str, Any]:
    """The description of a request with pictures."""
    files = {"type": "array", "items": PICTURE, "minItems": 1} if many else PICTURE
    form = {"type": "object", "properties": {"pictures": files}, "required": ["pictures"]}
    content = {"multipart/form-data": {"schema": form}, "application/octet-stream": {"schema": PICTURE}}
    return {"requestBody": {"required": True, "content": content | {"image/*": {"schema": PICTURE}}}}
