"""Servers in processes of their own: under load, abused, ended by signals, in a browser, and without torch."""

import contextlib
import http.client
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from project.bench import serving as bench
from tests.test_serve import form, post

ROOT = Path(__file__).parent.parent
ABUSES = 250 * int(os.environ.get("TORTURE", "2"))
SERVE = [sys.executable, "-m", "project.cli", "serve"]


@pytest.fixture
def served(packed, tmp_path):
    """A server of a bundle, in a process; its port, the process, its log and a folder that it may write into."""
    place = tmp_path / "place"
    (place / "tmp").mkdir(parents=True)
    environment = os.environ | {"TMPDIR": str(place / "tmp"), "PYTHONPATH": str(ROOT)}
    options = ["--port", "0", "--timeout", "10", "--max_body", "4", "--threads", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*SERVE, str(packed), *options], stdout=subprocess.PIPE, stderr=log, text=True, cwd=place, env=environment
        )
        port = next(int(found[1]) for line in process.stdout if (found := re.match(r"http://\S+:(\d+)", line)))
        yield port, process, tmp_path / "log", place
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def picture(trained):
    return (trained / "photos" / "red" / "000.png").read_bytes()


def test_bundle_is_served_without_torch_and_without_telling_its_runtimes_maker(packed, tmp_path):
    code = (
        "import sys\nfrom project import cli\nimport project.serve.server as server\n"
        "server.run = lambda *_: print(*{'torch', 'matplotlib', 'lightning', 'scipy'} & set(sys.modules)) or 0\n"
        f"sys.exit(cli.main(['serve', {str(packed)!r}, '--port', '0']))"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment = plain | {"TMPDIR": str(tmp_path)}  # where the runtime would keep the number of a session
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[2] == ""
    assert not list(tmp_path.iterdir())


class Client(threading.Thread):
    """Asks until it is told that this was the last answer, or nobody listens any more."""

    def __init__(self, port, content, keeps):
        super().__init__()
        self.port, self.content, self.keeps = port, content, keeps
        self.answered, self.lost = Counter(), []

    def run(self):
        connection = None
        while True:
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                try:
                    connection.connect()
                except OSError:
                    return
            try:
                connection.request("POST", "/predict", self.content)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(error)
                return
            self.answered[answer.status] += 1
            if answer.getheader("connection") == "close":
                connection.close()
                return
            if not self.keeps:
                connection.close()
                connection = None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_under_load_loses_no_request(served, picture, number):
    port, process, log, _ = served
    clients = [Client(port, picture, keeps=place % 2 == 0) for place in range(16)]
    for client in clients:
        client.start()
    time.sleep(2)
    process.send_signal(number)
    for client in clients:
        client.join(30)
    assert process.wait(20) == 128 + number
    assert not [error for client in clients for error in client.lost]
    answered = sum((client.answered for client in clients), Counter())
    assert set(answered) == {200}
    assert sum(answered.values()) == len(re.findall(r"POST /predict 200", log.read_text())) > 32
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_load_has_no_errors_below_the_queue_and_only_503_above_and_memory_stays(served, packed, picture):
    port, process, _, _ = served
    requests = [bench.request(picture)]
    bench.load(port, requests, 64, 3)
    before = bench.resident(process)
    for clients in (1, 8, 64):
        made = bench.load(port, requests, clients, 3)
        assert set(made.statuses) == {200}, clients
        assert len(made.latencies) == made.statuses[200] > 10
    assert bench.resident(process) < before + 20e6
    with bench.server(packed, "--queue", "4", "--max_images", "4") as (small, _):
        made = bench.load(small, requests, 64, 3)
        assert set(made.statuses) == {200, 503}
        assert bench.load(small, requests, 1, 1).statuses.keys() == {200}


def send(port, content, wait=10.0):
    """Sends bytes; the status of the answer, or None where the connection ends without one."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR) if content.endswith(b"\n\n") else None
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", connection.recv(4096))
        return int(found[1]) if found else None


def head(length, path="/predict", kind="application/octet-stream", more=""):
    told = f"Host: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}"
    return f"POST {path} HTTP/1.1\r\n{told}\r\n".encode()


def spoilt(content, chance):
    """Some bytes are others, some are missing, some are there twice."""
    made = bytearray(content)
    for _ in range(chance.randint(1, 20)):
        place = chance.randrange(len(made))
        kind = chance.random()
        if kind < 0.6:
            made[place] = chance.randrange(256)
        elif kind < 0.8:
            del made[place : place + chance.randint(1, 50)]
        else:
            made[place:place] = made[place : place + chance.randint(1, 50)]
        made = made or bytearray(b"x")
    return bytes(made)


def encoded(kind, size=(64, 64), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def abuse(chance, samples, port):
    """One request that a server should not be sent; its status."""
    path = chance.choice(["/predict", "/predict", "/predict", "/explain", "/explain?target=red"])
    sample = chance.choice(samples)
    body, kind = form(
        [(chance.choice(["a", "../../x", "/etc/passwd", "C:\\x", "\\\\h\\x", "%00", "n" * 3000]), sample)]
    )
    what = chance.randrange(17)
    if what == 0:
        made = spoilt(body, chance)
        return send(port, head(len(made), path, kind) + made)
    if what == 1:
        made = spoilt(sample, chance)
        return send(port, head(len(made), path) + made)
    if what == 2:
        made = sample[: chance.randrange(1, len(sample))]
        return send(port, head(len(made), path) + made)
    if what == 3:
        made = encoded(chance.choice(["PNG", "TIFF", "GIF", "BMP"]), mode="1")
        wide = chance.randrange(2**31)  # a picture that says it is larger than it is
        made = made[:16] + wide.to_bytes(4, "big") * 2 + made[24:] if made[1:4] == b"PNG" else spoilt(made, chance)
        return send(port, head(len(made), path) + made)
    if what == 4:
        wrong = chance.choice(
            ["text/html", "application/json", "multipart/mixed", "image", "", "\x7f", "multipart/form-data"]
        )
        return send(port, head(len(sample), path, wrong) + sample)
    if what == 5:
        return send(port, head(0, path, more="X: " + "y" * chance.randrange(200_000) + "\r\n"))
    if what == 6:
        with socket.create_connection(("127.0.0.1", port)) as connection:  # and is gone
            connection.sendall((head(len(sample), path) + sample)[: chance.randrange(len(sample))])
        return None
    if what == 7:
        return send(port, chance.randbytes(chance.randrange(1, 5000)) + b"\r\n\r\n\n\n")
    if what == 8:
        length = chance.choice(["-1", "1e3", "0x10", "9" * 40, "5, 5", "", "٣"])
        return send(port, head(0, path).replace(b"Content-Length: 0", f"Content-Length: {length}".encode()) + b"\n\n")
    if what == 9:
        chunks = chance.choice([b"zz\r\n", b"ffffffffff\r\n", b"5\r\nabc", b"-1\r\n", b"1;" + b"x" * 70_000])
        start = head(0, path).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        return send(port, start + chunks + b"\r\n\r\n\n\n")
    if what == 10:
        place = chance.choice(
            ["/../../etc/passwd", "/static/../app.py", "/%00", "//", "/static/%2e%2e", "/" + "a" * 9000]
        )
        return send(port, f"GET {place} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    if what == 11:
        method = chance.choice(["PUT", "DELETE", "TRACE", "CONNECT", "HEAD", "BREW", "get"])
        return send(port, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    if what == 12:
        return send(port, head(len(sample), path, more="Upgrade: websocket\r\nConnection: Upgrade\r\n") + sample)
    if what == 13:
        made, many = form([(str(n), sample[:50]) for n in range(chance.randrange(30, 300))])
        return send(port, head(len(made), path, many) + made)
    if what == 14:
        length = chance.randrange(4_000_001, 60_000_000)
        return send(port, head(length, path) + bytes(chance.randrange(100_000)) + b"\n\n")
    if what == 15:
        return send(port, (head(len(sample), path) + sample) * 3)  # asks again before it is answered
    edge = chance.choice(["", "x" * 300, '"', "edge; boundary=other", "\x00"])
    return send(port, head(len(body), path, f"multipart/form-data; boundary={edge}") + body)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_abuse_brings_no_crash_no_failure_no_file_and_no_growth(served, picture):
    port, process, log, place = served
    samples = [picture, *(encoded(kind) for kind in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"))]
    idle = []
    for number in range(40):  # whoever is slow does not hold up the others
        idle.append(socket.create_connection(("127.0.0.1", port)))
        idle[-1].sendall(head(len(picture))[: 20 + 5 * number])
    statuses, before = Counter(), 0
    with ThreadPoolExecutor(8) as pool:
        for first in range(0, ABUSES, 100):
            chances = [random.Random(number) for number in range(first, first + 100)]
            statuses.update(pool.map(lambda chance: abuse(chance, samples, port), chances))
            status, answer = post(port, "/predict", picture)
            assert (status, answer["predictions"][0]["error"]) == (200, None)
            if first == ABUSES // 3 // 100 * 100:
                before = bench.resident(process)
    for connection in idle:
        connection.settimeout(15)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100)[9:12] in (b"", b"408", b"400")
        connection.close()
    growth = bench.resident(process) - before
    print(f"{ABUSES:,} requests: {dict(statuses)}; memory {before / 1e6:.0f} MB, {growth / 1e6:+.1f} MB")
    assert process.poll() is None
    assert {status for status in statuses if status and status >= 500} <= {503}
    assert {200, 400, 404, 405, 413, 415, 422} <= set(statuses)
    assert "Traceback" not in log.read_text()
    assert "failed" not in log.read_text()
    assert not [file for file in place.rglob("*") if file.is_file()]
    assert growth < 50e6
    assert post(port, "/predict", picture)[0] == 200


@pytest.mark.slow
def test_server_does_what_its_own_description_says(served, tmp_path):
    port = served[0]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
    # a description cannot say that bytes must be a picture, or a word one of the classes
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "50", "--seed", "1", "--no-color"]
    made = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stdout[-5000:] + made.stderr
