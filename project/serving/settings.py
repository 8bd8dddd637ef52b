"""The limits within which a server answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a server allows and how it computes.

    Attributes:
        token: The bearer token of a request; None for none.
        hosts: Host names of this server; empty for any.
        max_body: Bytes of a request.
        max_images: Images of a request.
        queue: Images that may wait.
        timeout: Seconds until a request must be answered.
        batch_size: Images computed at once, at most.
        batch_wait: Seconds that a decoded image waits for others, at most.
        top: Most probable classes in a prediction.
        min_confidence: Probability below which a prediction abstains.
        threads: Threads that decode, and threads that compute.
        parallel: Batches computed at once, which share the threads.
    """

    token: str | None
    hosts: frozenset[str]
    max_body: int
    max_images: int
    queue: int
    timeout: float
    batch_size: int
    batch_wait: float
    top: int
    min_confidence: float
    threads: int
    parallel: int
