"""uvicorn around the application; a signal ends it once all requests are answered."""

import logging
import os
import signal
import socket
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

from project.serving import batching
from project.serving.middleware import LimitsMiddleware
from project.serving.settings import Settings


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OSError: The port is taken or not allowed, or the host is not one of this machine's addresses.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.create_server(address[:2], family=family, backlog=1024)
    # the head and the body of a response are two packets; the second must not wait until the first is acknowledged
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def make(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """The server of an application; its `run` takes a list with the listening socket."""
    config = uvicorn.Config(
        LimitsMiddleware(app, settings),
        http="h11",
        loop="asyncio",
        ws="none",
        log_config=None,
        log_level="error",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=500,  # connections
        timeout_keep_alive=10,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        h11_max_incomplete_event_size=16_384,  # bytes of a request's line and headers
    )
    return uvicorn.Server(config)


def run(app: FastAPI, listening: socket.socket, settings: Settings) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code, 130 or 143."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("project.serving").setLevel(logging.INFO)
    code = 0

    def stop(number: int, _: Any) -> None:  # uvicorn raises the signal again when it has ended
        nonlocal code
        code = code or 128 + number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    make(app, settings).run([listening])
    for thread in threading.enumerate():
        if thread.name.startswith(batching.THREADS):
            thread.join(1)  # an idle one ends at once
            if thread.is_alive():  # stuck in an image or a batch
                logging.shutdown()
                os._exit(code)
    return code
