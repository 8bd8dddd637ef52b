"""Serves predictions over HTTP: python -m project.cli serve runs/digits/version_0/bundle."""

import logging
import os
import re
import signal
import sys
from ipaddress import ip_address

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from project.data.workers import usable_cores
from project.errors import UserError
from project.serving.settings import Settings

TOKEN = "SERVE_TOKEN"  # the environment variable: a word of the command line is in the list of processes
PLAIN_TOKEN = r"[!-~][ -~]{6,}[!-~]"


class LogFormatter(logging.Formatter):
    """Says what the numbers in uvicorn's line about a request are, without the query, which may hold a secret."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r'(\S+) - "(\S+ [^\s?]*).* HTTP/\S+" (\d+)$', r"\2: status \3, client \1", super().format(record))


def serve(
    model: str,
    /,
    host: str = "127.0.0.1",
    port: NonNegativeInt = 8000,
    token: str | None = None,
    public: bool = False,
    calibrated: bool = False,
    top: PositiveInt = 5,
    min_confidence: ClosedUnitInterval = 0,
    threads: PositiveInt | None = None,
    parallel: PositiveInt = 1,
    batch_size: PositiveInt = 32,
    batch_wait: NonNegativeFloat = 50,
    queue: PositiveInt = 256,
    timeout: PositiveFloat = 30,
    max_images: PositiveInt = 32,
    max_body: PositiveInt = 32,
    trust: tuple[str, ...] = (),
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
        calibrated: Use the temperature found by `report`. (A bundle has it built in after export --calibrated.)
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
        trust: Class path of the checkpoint's network, if that is neither this package's nor a library's; repeatable.
    """
    if port > 65535:
        raise UserError(f"--port is {port}; it must be at most 65535.")
    if queue < max_images:
        raise UserError(f"--queue is {queue}, but must have room for a request with --max_images {max_images}.")
    token = (os.environ.get(TOKEN) or None) if token is None else token
    if token is not None and not re.fullmatch(PLAIN_TOKEN, token):
        raise UserError("The token must have 8 or more printable ASCII characters, without blanks at its ends.")
    try:
        from project.serving.app import listen, server
        from project.serving.model import Model
    except ImportError as error:
        raise UserError(f"serve needs the library {error.name}; install it: pip install -e .[serve]") from error
    try:  # before anything slow
        listening = listen(host, port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Cannot listen on --host {host}, --port {port}: {reason}; --port 0 is a free one.") from error
    with listening:
        address, port = listening.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        is_loopback = ip_address(address).is_loopback
        if token is None and not is_loopback and not public:
            raise UserError(
                f"--host {host} can be reached by others: set a token in the environment variable {TOKEN}, or give "
                "--public to serve everybody."
            )
        settings = Settings(
            token=token,
            hosts=[name, "localhost", "127.0.0.1", "[::1]"] if is_loopback and token is None else [],
            max_body=max_body * 1_000_000,
            max_images=max_images,
            queue=queue,
            timeout=timeout,
            batch_size=batch_size,
            batch_wait=batch_wait / 1000,
            top=top,
            min_confidence=min_confidence,
            threads=threads or usable_cores(),
            parallel=parallel,
        )
        served = Model(model, calibrated, settings.threads, settings.parallel, trust)
        metadata = served.predictor.metadata
        print(f"{model}: {served.id}, {len(metadata.class_names):,} classes, {metadata.calibration} probabilities")
        print(f"http://{name}:{port} (Ctrl-C ends it)", flush=True)
        log = logging.StreamHandler()
        log.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        logging.basicConfig(handlers=[log])
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises it again once it has answered all requests
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        server(served, settings).run([listening])
    return 0
