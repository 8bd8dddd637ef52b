"""The limits within which a server answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a server allows and how it computes; the options of `serve` describe it."""

    token: str | None  # None for none
    hosts: list[str]  # names of this server; empty for any
    max_body: int  # bytes of a request
    max_images: int  # of a request
    queue: int  # images that may wait
    timeout: float  # seconds
    batch_size: int  # images computed at once, at most
    batch_wait: float  # seconds that a decoded image waits for others, at most
    top: int  # most probable classes in a prediction
    min_confidence: float  # a prediction of a lower probability abstains
    threads: int  # that decode, and that compute
    parallel: int  # batches computed at once, which share the threads
