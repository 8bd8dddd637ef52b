"""The server around the application: patience with connections, signals, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from project.serve import Settings, batching
from project.serve.limits import LARGEST_HEAD, Guard

PATIENCE = 10  # seconds until the head of a request must be there, and that an unused or unread connection is kept
MOST_CONNECTIONS = 500
LINGER = 1  # seconds in which connections that are open at the end may still ask


class Protocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever, and not for any number of connections."""

    _hurry: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock."""
        super().connection_made(transport)
        # head and body of an answer are two packets, of which the second must not wait for news of the first
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        self._expect()

    def on_response_complete(self) -> None:
        """Starts it again."""
        self._expect()
        self._watch()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops it."""
        for timer in (self._hurry, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which would keep a broken connection, and its request, in memory

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        self._watch()
        super().pause_writing()

    def _watch(self) -> None:
        """Gives up on a client that reads nothing for as long as patience lasts, also of the last answer."""
        if self._stuck is not None:
            self._stuck.cancel()
        if left := self.transport.get_write_buffer_size():
            self._stuck = self.loop.call_later(PATIENCE, self._look_again, left)

    def _look_again(self, before: int) -> None:
        if self.transport.get_write_buffer_size() >= before:
            self.transport.abort()
        else:
            self._watch()

    def _expect(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
        if not self.transport.is_closing():
            self._hurry = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer is still being read, or not: that is watched
            self._expect()
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class Server(uvicorn.Server):
    """Ends by a signal when every request that has begun is answered.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    exit_code = 0

    def __init__(self, config: uvicorn.Config, guard: Guard) -> None:
        super().__init__(config)
        self._guard = guard

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Notes signals; unlike uvicorn's, they do not end the process a second time afterwards."""
        if threading.current_thread() is not threading.main_thread():  # no other may set a handler
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it in order, a second Ctrl-C at once."""
        self.exit_code = self.exit_code or 128 + sig
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no new connections; those that are open get their answers, and are told that these are the last."""
        self._guard.is_ending = True
        arrived = [connection for listening in sockets or [] for connection in _arrived(listening)]
        for server in self.servers:  # at once: who comes in between is lost
            server.close()
        loop = asyncio.get_running_loop()
        for connection in arrived:
            with contextlib.suppress(OSError):  # it has gone again
                await loop.connect_accepted_socket(self._protocol, connection)
        until = loop.time() + LINGER
        await asyncio.sleep(0.1)  # those that are just being taken are no connections yet
        while self.server_state.connections and loop.time() < until and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)


def _arrived(listening: socket.socket) -> Iterator[socket.socket]:
    """Connections that the system has made and nobody has taken: closing the socket would reset them."""
    with contextlib.suppress(OSError):  # no more of them, or no more of them may be held
        while True:
            yield listening.accept()[0]


def make(app: FastAPI, settings: Settings) -> Server:
    """The server of an application, with all its limits; its `run` takes a list with the socket."""
    guard = Guard(app, settings)
    config = uvicorn.Config(
        guard,
        http=Protocol,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=PATIENCE,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    return Server(config, guard)


def run(app: FastAPI, listening: socket.socket, settings: Settings) -> int:
    """Serves until a signal comes; returns the exit code, or ends the process with it where some work does not end."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("project.serve").setLevel(logging.INFO)
    server = make(app, settings)
    server.run([listening])
    for thread in threading.enumerate():
        if thread.name.startswith(batching.THREADS):
            thread.join(1)  # an idle one ends at once
            if thread.is_alive():
                logging.shutdown()
                os._exit(server.exit_code)
    return server.exit_code
