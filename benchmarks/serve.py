"""Requests a second and their latency, beside one image at a time and LitServe."""

import asyncio
import importlib.util
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np

from benchmarks import bundle
from project.commands.bench import make_photographs
from project.data.workers import usable_cores
from project.export import onnx

CLIENTS = (1, 8, 64)  # each sends its next request when the last one is answered
BESIDE = 32  # clients of the servers that take turns
CORES = usable_cores()
START_UP = 120  # seconds in which a server must answer
TURNS = 3
WARM_UP = 2.0  # seconds


class Load(NamedTuple):
    """The outcome of a load."""

    seconds: float  # from the first request to the last response
    latencies: list[float]  # seconds of each request with status 200
    statuses: Counter[int]  # number of responses by status; 0 is a connection that broke


def serve(image_size: int = 224, seconds: float = 30) -> dict[str, Any]:
    """Serves AlexNet with random weights in 32 and in 8 bits, in batches, one image at a time and by LitServe.

    Args:
        image_size: Side of the images for the network, in pixels.
        seconds: Of each load.
    """
    onnx.library_versions()
    print(f"AlexNet, {image_size} px, a JPEG of 475 x 404 pixels a request, {CORES} cores for server and clients")
    with tempfile.TemporaryDirectory() as folder:
        _, bundles = bundle.make(image_size, Path(folder))
        images = [file.read_bytes() for file in make_photographs(Path(folder, "photos"), 32).rglob("*.jpg")]
        return {name: _measure(name, path, images, seconds) for name, path in bundles.items()}


def _measure(name: str, folder: Path, images: list[bytes], seconds: float) -> dict[str, Any]:
    print(f"\n{name:28}  clients  requests/s   p50 ms   p99 ms  others")
    requests, figures = [request(image) for image in images], dict[str, Any]()
    with server(folder) as (port, _):
        load(port, requests, CLIENTS[-1], WARM_UP)
        for clients in CLIENTS:
            figures[str(clients)] = _show("", clients, load(port, requests, clients, seconds))
    forms = [form(image) for image in images]  # LitServe takes no bare images
    servers: dict[str, Callable[[], Any]] = {
        "batches": partial(server, folder),
        "one by one": partial(server, folder, "--batch_size", "1"),
        "one by one on each core": partial(server, folder, "--batch_size", "1", "--parallel", str(CORES)),
    }
    if importlib.util.find_spec("litserve") is not None:  # pip install litserve
        other = partial(server, folder, module="benchmarks.litserve", health="health")
        servers |= {
            "LitServe": partial(other, "1", str(CORES)),
            "LitServe on each core": partial(other, str(CORES), "1"),
        }
    loads: dict[str, list[Load]] = {way: [] for way in servers}
    for _, (way, start) in itertools.product(range(TURNS), servers.items()):
        with start() as (port, _):
            load(port, forms, BESIDE, WARM_UP)
            loads[way].append(load(port, forms, BESIDE, seconds / TURNS))
    for way, turns in loads.items():
        latencies = [latency for turn in turns for latency in turn.latencies]
        statuses = sum((turn.statuses for turn in turns), Counter[int]())
        figures[way] = _show(way, BESIDE, Load(sum(turn.seconds for turn in turns), latencies, statuses))
    return figures


def _show(name: str, clients: int, outcome: Load) -> dict[str, Any]:
    """Prints and returns requests a second, latency, and the responses that were not 200."""
    median, slow = np.percentile(outcome.latencies or [0.0], (50, 99)).tolist()
    rate = len(outcome.latencies) / outcome.seconds
    others = {str(status): count for status, count in outcome.statuses.items() if status != 200}
    shown = ", ".join(f"{count:,} x {status}" for status, count in others.items()) or "none"
    print(f"{name:28}  {clients:7}  {rate:10,.1f}  {1e3 * median:7.1f}  {1e3 * slow:7.1f}  {shown}", flush=True)
    return {"requests_per_second": rate, "p50_seconds": median, "p99_seconds": slow, "others": others}


@contextmanager
def server(
    model: Path, *options: str, module: str = "project.cli serve", health: str = "healthz"
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server in processes of its own, from its first answer on; yields its port and the first process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", *module.split(), str(model), "--port", str(port), *options]
    quiet, started = subprocess.DEVNULL, time.monotonic()
    with subprocess.Popen(command, start_new_session=True, stdout=quiet, stderr=quiet, text=True) as process:
        try:
            while process.poll() is None and time.monotonic() < started + START_UP:
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/{health}", timeout=5):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"The server has not started: {' '.join(command)}")
            yield port, process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def request(image: bytes, kind: str = "image/jpeg") -> bytes:
    """A request with one image, or another body."""
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(image)}"
    return head.encode() + b"\r\n\r\n" + image


def form(image: bytes) -> bytes:
    """A request with one image as the file of a form."""
    part = b'--X\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n' + image
    return request(part + b"\r\n--X--\r\n", "multipart/form-data; boundary=X")


def load(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    """Sends requests from several clients at once, each over one connection, for some seconds."""

    async def run() -> float:
        started = time.perf_counter()
        end, count = started + seconds, len(requests)
        await asyncio.gather(*(_client(port, requests[n % count :] + requests, end, outcome) for n in range(clients)))
        return time.perf_counter() - started  # the last responses come after the end

    outcome = Load(seconds, [], Counter())
    return outcome._replace(seconds=asyncio.run(run()))


async def _client(port: int, requests: list[bytes], end: float, outcome: Load) -> None:
    number = 0
    while time.perf_counter() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while time.perf_counter() < end:
                started = time.perf_counter()
                writer.write(requests[number % len(requests)])
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                number, status = number + 1, int(head[9:12])
                outcome.statuses[status] += 1
                if status == 200:
                    outcome.latencies.append(time.perf_counter() - started)
                else:
                    await asyncio.sleep(0.05)  # before the next try
        except (OSError, EOFError):
            outcome.statuses[0] += 1
        finally:
            writer.close()
