"""Answers over HTTP what is on pictures: python -m project.cli serve runs/digits/version_0/bundle."""

import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from project.errors import UserError

TOKEN = "SERVE_TOKEN"  # the environment variable: a word of the command line is in the list of processes
SHORTEST_TOKEN = 8


@dataclass(frozen=True)
class Settings:
    """How a server answers.

    Attributes:
        token: What a request must bring; None where it need not.
        hosts: Names by which a request may call this server; empty where any will do.
        max_body: Bytes of a request.
        max_images: Pictures of a request.
        queue: Pictures that may wait for their answers.
        timeout: Seconds until a request must be answered.
        batch_size: Pictures that are computed at once, at most.
        batch_wait: Seconds that a picture which is read waits for others to be read, at most.
        top: Likeliest classes in an answer.
        min_confidence: Probability below which an answer abstains.
        threads: That read pictures, or compute with the network.
        parallel: Batches that are computed at once and share the threads.
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


def serve(
    model: str,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    public: bool = False,
    calibrated: bool = False,
    top: int = 5,
    min_confidence: float | None = None,
    threads: int | None = None,
    parallel: int = 1,
    batch_size: int = 32,
    batch_wait: float = 50,
    queue: int = 256,
    timeout: float = 30,
    max_images: int = 32,
    max_body: int = 32,
) -> int:
    """Answers over HTTP: a page for people at /, POST /predict and POST /explain for programs, described at /docs.

    Pictures of requests that come at the same time are computed together. Ctrl-C or SIGTERM ends it when all requests
    that have begun are answered (exit code 130 or 143).

    Args:
        model: A bundle that export has made, a checkpoint, or a run's folder. A bundle needs no torch.
        host: The address to listen on; 0.0.0.0 is all of this machine's, which asks for a token.
        port: The port; 0 takes a free one, and says which.
        token: What a request must bring as "Authorization: Bearer TOKEN". Better in the environment variable
            SERVE_TOKEN: others see the words of a command line.
        public: Let a host that others can reach answer without a token.
        calibrated: Use the temperature that `report` has found. (A bundle has it built in, if it was known.)
        top: So many likeliest classes in an answer.
        min_confidence: Answers whose likeliest class has a lower probability than this say "abstained": true.
        threads: That read pictures or compute, by default as many as there are cores.
        parallel: Batches computed at once, which share the threads. More than one is for machines with so many cores
            that one batch does not keep them busy; a checkpoint computes one.
        batch_size: Pictures computed at once, at most.
        batch_wait: Milliseconds that a picture which is read waits for others to be read, at most.
        queue: Pictures that may wait; a request beyond that gets 503 and when to come back.
        timeout: Seconds until a request must be answered.
        max_images: Pictures in a request.
        max_body: Megabytes of a request.
    """
    counts = {"port": (port, 0), "top": (top, 1), "threads": (threads, 1), "parallel": (parallel, 1)}
    counts |= {"batch_size": (batch_size, 1)}
    counts |= {"queue": (queue, 1), "max_images": (max_images, 1), "max_body": (max_body, 1)}
    for option, (value, least) in counts.items():
        if value is not None and value < least:
            raise UserError(f"--{option} is {value}; it must be at least {least}.")
    if port > 65535:
        raise UserError(f"--port is {port}; ports go up to 65535.")
    if not 0 <= batch_wait <= 1000:
        raise UserError(f"--batch_wait is {batch_wait}; it must be from 0 to 1000 milliseconds.")
    if not 0 < timeout <= 3600:
        raise UserError(f"--timeout is {timeout}; it must be above 0 and at most 3600 seconds.")
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise UserError(f"--min_confidence is {min_confidence}; it must be a probability, from 0 to 1.")
    if queue < max_images:
        raise UserError(
            f"--queue is {queue}, but a request may have --max_images {max_images}, which must fit into it."
        )
    token = _checked((os.environ.get(TOKEN) or None) if token is None else token)
    try:
        from project.serve import app, server
    except ImportError as error:
        raise UserError(f"serve needs the library {error.name}; install it: pip install -e .[serve]") from error
    listening, is_loopback = _listen(host, port)
    with listening:
        if token is None and not is_loopback and not public:
            raise UserError(
                f"--host {host} can be reached by others: set a token in the environment variable {TOKEN}, or give "
                "--public to answer everybody."
            )
        from project.data.workers import usable_cores

        own_names = {host.lower(), "localhost", "127.0.0.1", "::1"} if is_loopback and token is None else ()
        settings = Settings(
            token=token,
            hosts=frozenset(own_names),
            max_body=max_body * 1_000_000,
            max_images=max_images,
            queue=queue,
            timeout=timeout,
            batch_size=batch_size,
            batch_wait=batch_wait / 1000,
            top=top,
            min_confidence=min_confidence or 0.0,
            threads=threads or usable_cores(),
            parallel=parallel,
        )
        from project.serve.model import Model

        served = Model(model, calibrated, settings.threads, settings.parallel)
        name = f"[{host}]" if ":" in host else host
        print(f"{served.id}, {len(served.predictor.class_names):,} classes")
        print(f"http://{name}:{listening.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        return server.run(app.build(served, settings), listening, settings)


def _checked(token: str | None) -> str | None:
    is_plain = token is None or (token.isascii() and token.isprintable() and token == token.strip())
    if token is not None and not (is_plain and len(token) >= SHORTEST_TOKEN):
        raise UserError(
            f"The token must have {SHORTEST_TOKEN} or more characters, all of them ASCII and printable, without blanks "
            "before or after them."
        )
    return token


def _listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """A socket, bound before anything slow begins, and whether only this machine can reach it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no address"
        raise UserError(
            f"Cannot listen on --host {host}, --port {port}: {reason[0].lower()}{reason[1:]}; give others (--port 0 is "
            "any that is free)."
        ) from error
    return listening, ip_address(str(address[0]).partition("%")[0]).is_loopback
