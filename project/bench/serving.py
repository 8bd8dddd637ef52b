"""How many requests a server answers, and how soon: python -m project.cli bench serve."""

import asyncio
import http.client
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from project import convert
from project.bench import bundle
from project.bench.pictures import make_photographs
from project.data.workers import usable_cores

CLIENTS = (1, 8, 64)  # each sends its next request when the last one is answered
BESIDE = 32  # clients that ask a server with batches, others without, and LitServe
CORES = usable_cores()
WAYS: dict[str, Sequence[str]] = {
    "batches": (),
    "one by one": ("--batch_size", "1"),
    "one by one on each core": ("--batch_size", "1", "--parallel", str(CORES)),
}
LITSERVE = {"LitServe": (1, CORES), "LitServe on each core": (CORES, 1)}  # workers and the threads of each
PATIENCE = 120  # seconds until it must answer
TURNS = 3
CROWDED = ("--queue", "32")  # half as many places as there are clients
PICTURES = 32
WARM_UP = 2.0  # seconds


class Load(NamedTuple):
    """What came of a load.

    Attributes:
        seconds: From the first request to the last answer.
        latencies: Seconds of each request that got an answer of status 200.
        statuses: How often each was answered; 0 is a connection that broke.
    """

    seconds: float
    latencies: list[float]
    statuses: Counter[int]

    def figures(self) -> dict[str, Any]:
        """Requests a second, milliseconds, and what was not 200."""
        middle, slow = np.percentile(self.latencies or [0.0], (50, 99)).tolist()
        return {
            "requests_per_second": len(self.latencies) / self.seconds,
            "p50_seconds": middle,
            "p99_seconds": slow,
            "others": {str(status): count for status, count in self.statuses.items() if status != 200},
        }


def measure(image_size: int, seconds: float, scratch: Path) -> dict[str, Any]:
    """Serves AlexNet with random weights in 32 and in 8 bits, and asks; prints the tables and returns them.

    Args:
        image_size: Side of the pictures as the network sees them, in pixels.
        seconds: Of each load.
        scratch: A folder for the bundles and pictures.
    """
    convert.require_libraries()
    _, bundles = bundle.make(image_size, scratch)
    photographs = sorted(make_photographs(scratch / "photos", PICTURES).rglob("*.jpg"))
    pictures = [file.read_bytes() for file in photographs]
    requests = [request(picture) for picture in pictures]
    print(
        f"{bundle.MODEL}, {image_size} px, one JPEG of 475 x 404 pixels a request, {CORES} cores for server and "
        f"clients, {seconds:g} s each\n"
    )
    result: dict[str, Any] = {}
    for name, folder in bundles.items():
        print(f"{name:28}  clients  requests/s   p50 ms   p99 ms  others")
        found = result[name] = {}
        with server(folder) as (port, process):
            load(port, requests, CLIENTS[-1], 2 * WARM_UP)  # memory grows until the first full batches
            before = resident(process)
            for clients in CLIENTS:
                found[str(clients)] = _told("", clients, load(port, requests, clients, seconds))
            found["memory"] = {"before": before, "after": resident(process)}
        found |= _beside(folder, pictures, seconds)
        with server(folder, *CROWDED) as (port, _):
            found["crowded"] = _told("a queue of 32", CLIENTS[-1], load(port, requests, CLIENTS[-1], seconds))
        rates = {way: found[way]["requests_per_second"] for way in (*WAYS, *LITSERVE) if way in found}
        ratios = ", ".join(
            f"{rates['batches'] / rate:.2f} times {way}" for way, rate in rates.items() if way != "batches"
        )
        growth = (found["memory"]["after"] - before) / 1e6
        print(f"\nBatches: {ratios}. Memory: {before / 1e6:.0f} MB, then {growth:+.0f} MB\n")
    return result


def _beside(folder: Path, pictures: list[bytes], seconds: float) -> dict[str, Any]:
    """A server with batches, others without, and LitServe, in turn."""
    requests = [form(picture) for picture in pictures]  # LitServe takes no bare pictures
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server(folder, *WAYS[name])) for name in WAYS}
        if importlib.util.find_spec("litserve") is not None:
            servers |= {name: stack.enter_context(_litserve(folder, *how)) for name, how in LITSERVE.items()}
        else:
            print("(LitServe is not installed here: pip install litserve)")
        loads: dict[str, list[Load]] = {name: [] for name in servers}
        for turn in range(TURNS + 1):
            for name, (port, process) in servers.items():
                with _alone(process, [other for _, other in servers.values()]):
                    made = load(port, requests, BESIDE, seconds / TURNS if turn else WARM_UP)
                loads[name] += [made] if turn else []
    return {
        name: _told(
            name,
            BESIDE,
            Load(
                sum(one.seconds for one in some),
                [latency for one in some for latency in one.latencies],
                sum((one.statuses for one in some), Counter()),
            ),
        )
        for name, some in loads.items()
    }


def _told(name: str, clients: int, made: Load) -> dict[str, Any]:
    figures = made.figures()
    others = ", ".join(f"{count:,} x {status}" for status, count in figures["others"].items()) or "none"
    print(
        f"{name:28}  {clients:7}  {figures['requests_per_second']:10,.1f}  {1e3 * figures['p50_seconds']:7.1f}  "
        f"{1e3 * figures['p99_seconds']:7.1f}  {others}",
        flush=True,
    )
    return figures


@contextmanager
def _alone(process: subprocess.Popen[str], servers: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Stops all others for a while: LitServe, which looks for work all the time, costs its neighbours a tenth."""
    others = [other for other in servers if other is not process]
    try:
        for other in others:
            os.killpg(other.pid, signal.SIGSTOP)
        yield
    finally:
        for other in others:
            os.killpg(other.pid, signal.SIGCONT)


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "project.cli", "serve", str(model), "--port", "0", *options]
    with _started(command, subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            port = next((found[1] for line in process.stdout if (found := re.match(r"http://\S+:(\d+)", line))), None)
            if port is None:
                raise RuntimeError(f"The server has not started: {' '.join(command)}")
            yield int(port), process
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _litserve(folder: Path, workers: int, threads: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """LitServe in processes of its own; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "project.bench.litserve", str(folder), *map(str, (port, workers, threads))]
    with _started(command, subprocess.DEVNULL) as process:
        try:
            started = time.monotonic()
            while not _is_up(port):
                if process.poll() is not None or time.monotonic() > started + PATIENCE:
                    raise RuntimeError(f"LitServe has not started: {' '.join(command)}")
                time.sleep(0.2)
            yield port, process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too


def _started(command: list[str], output: int) -> subprocess.Popen[str]:
    # as a group, which can be stopped as a whole
    return subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, text=True, start_new_session=True)


def _is_up(port: int) -> bool:
    with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory that a process has; 0 where the system does not say."""
    file = Path(f"/proc/{process.pid}/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", file.read_text()) if file.is_file() else None
    return 1024 * int(found[1]) if found else 0


def request(picture: bytes) -> bytes:
    """One picture as a request."""
    return _request("image/jpeg", picture)


def form(picture: bytes) -> bytes:
    """One picture as the file of a form, as a request."""
    part = b'--X\r\nContent-Disposition: form-data; name="pictures"; filename="a.jpg"\r\n\r\n' + picture
    return _request("multipart/form-data; boundary=X", part + b"\r\n--X--\r\n")


def _request(kind: str, body: bytes) -> bytes:
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def load(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    """So many clients ask for so long, each one request after the other over one connection."""
    return asyncio.run(_load(port, requests, clients, seconds))


async def _load(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    made, begun = Load(seconds, [], Counter()), time.perf_counter()
    end = begun + seconds
    await asyncio.gather(*(_client(port, requests[n % len(requests) :] + requests, end, made) for n in range(clients)))
    return made._replace(seconds=time.perf_counter() - begun)  # the last answers came after the end


async def _client(port: int, requests: list[bytes], end: float, made: Load) -> None:
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
                made.statuses[status] += 1
                if status == 200:
                    made.latencies.append(time.perf_counter() - started)
                else:
                    await asyncio.sleep(0.05)  # who is told to come back does not ask at once
        except (OSError, EOFError):
            made.statuses[0] += 1
        finally:
            writer.close()
