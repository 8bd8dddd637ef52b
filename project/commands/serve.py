"""Serves predictions over HTTP: python -m project.cli serve runs/digits/version_0/bundle."""

import os
from ipaddress import ip_address

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from project.errors import UserError
from project.serving.settings import Settings

TOKEN = "SERVE_TOKEN"  # the environment variable: a word of the command line is in the list of processes
SHORTEST_TOKEN = 8


def serve(
    model: str,
    /,
    host: str = "127.0.0.1",
    port: NonNegativeInt = 8000,
    token: str | None = None,
    public: bool = False,
    calibrated: bool = False,
    top: PositiveInt = 5,
    min_confidence: ClosedUnitInterval | None = None,
    threads: PositiveInt | None = None,
    parallel: PositiveInt = 1,
    batch_size: PositiveInt = 32,
    batch_wait: NonNegativeFloat = 50,
    queue: PositiveInt = 256,
    timeout: PositiveFloat = 30,
    max_images: PositiveInt = 32,
    max_body: PositiveInt = 32,
) -> int:
    """Serves predictions over HTTP: a web page at /, POST /predict and POST /explain for programs; /docs explains them.

    Images of requests that arrive at the same time are computed in one batch. Ctrl-C or SIGTERM ends the server once
    all requests are answered (exit code 130 or 143).

    Args:
        model: A bundle made by export, a checkpoint, or a run's folder. A bundle needs no torch.
        host: The address to listen on; 0.0.0.0 means all addresses of this machine and requires a token.
        port: The port; 0 chooses a free one and prints it.
        token: A request must have the header "Authorization: Bearer TOKEN". Better set the environment variable
            SERVE_TOKEN: other users see a command line.
        public: Serve without a token on a host that others can reach.
        calibrated: Use the temperature found by `report`. (A bundle has it built in, if it was known.)
        top: Number of most probable classes listed in a prediction.
        min_confidence: Predictions of a lower probability have "abstained": true.
        threads: Threads that decode, and threads that compute; by default the usable cores.
        parallel: Batches of a bundle computed at once, which share the threads; for machines with more cores than one
            batch keeps busy.
        batch_size: Images computed at once, at most.
        batch_wait: Milliseconds that a decoded image waits for others, at most.
        queue: Images that may wait; a request beyond that gets status 503 and a time to retry.
        timeout: Seconds until a request must be answered.
        max_images: Images in a request.
        max_body: Megabytes of a request.
    """
    if port > 65535:
        raise UserError(f"--port is {port}; it must be at most 65535.")
    if queue < max_images:
        raise UserError(f"--queue is {queue}, but must have room for a request with --max_images {max_images}.")
    token = _checked((os.environ.get(TOKEN) or None) if token is None else token)
    try:
        from project.serving import app, server
    except ImportError as error:
        raise UserError(f"serve needs the library {error.name}; install it: pip install -e .[serve]") from error
    try:
        listening = server.listen(host, port)  # before anything slow
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not an address"
        raise UserError(
            f"Cannot listen on --host {host}, --port {port}: {reason[0].lower()}{reason[1:]}; give others (--port 0 "
            "chooses a free port)."
        ) from error
    with listening:
        is_loopback = ip_address(str(listening.getsockname()[0]).partition("%")[0]).is_loopback
        if token is None and not is_loopback and not public:
            raise UserError(
                f"--host {host} can be reached by others: set a token in the environment variable {TOKEN}, or give "
                "--public to serve everybody."
            )
        from project.data.workers import usable_cores
        from project.serving.model import Model

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
