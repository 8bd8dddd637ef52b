"""A server in this process, asked over real connections; tests/test_serving.py has those with processes."""

import asyncio
import contextlib
import gc
import http.client
import io
import json
import logging
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import attribution, load
from project.data import images
from project.errors import UserError
from project.serve import Settings, app, server
from project.serve.batching import Batcher, Full
from project.serve.model import Model
from tests.conftest import COLOURS

USUAL = Settings(
    token=None,
    hosts=frozenset({"127.0.0.1", "localhost"}),
    max_body=1_000_000,
    max_images=8,
    queue=16,
    timeout=10.0,
    batch_size=4,
    batch_wait=0.05,
    parallel=1,
    top=2,
    min_confidence=0.0,
    threads=1,
)


@contextmanager
def serving(model, **changes):
    """A server of a model, in a thread; gives its port."""
    settings = Settings(**{**USUAL.__dict__, **changes})
    made = server.make(app.build(model, settings), settings)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=made.run, args=([listening],))
        thread.start()
        try:
            yield port
        finally:
            made.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model(packed):
    return Model(str(packed), False, 1)


@pytest.fixture(scope="module")
def port(model):
    with serving(model) as number:
        yield number


@pytest.fixture(scope="module")
def pictures(trained):
    """Bytes of six pictures by name."""
    files = [file for name in COLOURS for file in sorted((trained / "photos" / name).iterdir())[:2]]
    return {f"{file.parent.name}-{file.name}": file.read_bytes() for file in files}


def ask(port, method, path, body=b"", **headers):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def post(port, path, body, kind="application/octet-stream", **headers):
    """Status and content of an answer, read as JSON where it is."""
    status, told, content = ask(port, "POST", path, body, Content_Type=kind, **headers)
    return status, json.loads(content) if told["content-type"] == "application/json" else content


def form(files):
    """A body with files, and its type."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="pictures"; filename="{name}"\r\n\r\n'.encode() + content
        for name, content in files
    ]
    return b"\r\n".join([*parts, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"


def test_answers_are_those_of_predict_from_the_same_bytes(port, packed, pictures):
    status, answer = post(port, "/predict", *form(pictures.items()))
    assert status == 200
    expected = load(packed).predict(pictures.values())
    assert answer["class_names"] == list(COLOURS)
    assert [row["name"] for row in answer["predictions"]] == list(pictures)
    for row, own in zip(answer["predictions"], expected, strict=True):
        assert row["label"] == own.label
        assert row["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
        assert row["probability"] == max(row["probabilities"])
        assert not row["abstained"]
        assert row["error"] is None
    for (name, content), own in zip(pictures.items(), expected, strict=True):
        status, answer = post(port, "/predict", content, "image/png")
        assert status == 200, name
        assert answer["predictions"][0]["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)


def test_checkpoint_answers_like_its_bundle_and_has_another_name(lively, model, pictures):
    own = Model(str(lively), False, 1)
    assert re.fullmatch(r"squeezenet1_1-[0-9a-f]{8}", own.id)
    assert re.fullmatch(r"squeezenet1_1-[0-9a-f]{12}", model.id)
    pixels = np.stack([own.read(content) for content in pictures.values()])
    assert np.allclose(own.predictor.probabilities(pixels), model.predictor.probabilities(pixels), atol=1e-4)


def test_likeliest_classes_come_in_order_and_unsure_answers_abstain(port, model, pictures):
    _, answer = post(port, "/predict", *form(pictures.items()))
    for row in answer["predictions"]:
        assert len(row["top"]) == 2
        best = sorted(zip(row["probabilities"], answer["class_names"], strict=True), reverse=True)[:2]
        assert [(one["probability"], one["label"]) for one in row["top"]] == best
    middle = float(np.median([row["probability"] for row in answer["predictions"]]))
    with serving(model, min_confidence=middle, top=50) as strict:
        _, again = post(strict, "/predict", *form(pictures.items()))
    abstained = [row["abstained"] for row in again["predictions"]]
    assert abstained == [row["probability"] < middle for row in answer["predictions"]]
    assert 0 < sum(abstained) < len(abstained)
    assert [len(row["top"]) for row in again["predictions"]] == [3] * 6


def test_unreadable_picture_is_named_and_the_others_are_labelled(port, pictures):
    good = pictures["red-000.png"]
    files = [("ok.png", good), ("../../etc/passwd", b"no picture"), ("half.png", good[: len(good) // 2]), ("e", b"")]
    status, answer = post(port, "/predict", *form(files))
    assert status == 200
    rows = answer["predictions"]
    assert [row["name"] for row in rows] == [name for name, _ in files]
    assert [row["label"] is None for row in rows] == [False, True, True, True]
    assert rows[1]["error"] == "not a picture, or of an unknown format"
    assert rows[2]["error"]
    status, answer = post(port, "/predict", b"no picture")
    assert status == 422
    assert answer["predictions"][0]["error"] == "not a picture, or of an unknown format"


def test_bomb_and_other_formats_are_refused_by_their_header(port):
    stream = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(stream, "PNG")
    _, answer = post(port, "/predict", stream.getvalue())
    assert f"more than the {images.MAX_PIXELS:,}" in answer["predictions"][0]["error"]
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    _, answer = post(port, "/predict", stream.getvalue())
    assert answer["predictions"][0]["error"] == "not a picture, or of an unknown format"


@pytest.mark.parametrize("kind", ["packed", "lively"])
def test_explanation_is_the_map_over_the_picture(kind, request, pictures):
    own = Model(str(request.getfixturevalue(kind)), False, 1)
    with serving(own) as number:
        status, png = post(number, "/explain", pictures["red-000.png"])
        other_status, other = post(number, "/explain?target=blue", *form([("a", pictures["red-000.png"])]))
        assert post(number, "/explain?target=grey", pictures["red-000.png"])[0] == 422
        assert post(number, "/explain", b"no picture")[0] == 422
        assert post(number, "/explain", *form([("a", b""), ("b", b"")]))[0] == 413
    assert (status, other_status) == (200, 200)
    maps = [np.asarray(Image.open(io.BytesIO(content))) for content in (png, other)]
    assert [made.shape for made in maps] == [(32, 32, 3)] * 2
    assert (maps[0] != maps[1]).any()


def test_two_explanations_at_once_do_not_get_into_each_others_way(packed, pictures, monkeypatch):
    own = Model(str(packed), False, 2, 2)
    own.network()
    at_once, most, heat_maps = [], [], attribution.heat_maps

    def counted(*arguments):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.1)
        at_once.pop()
        return heat_maps(*arguments)

    monkeypatch.setattr(attribution, "heat_maps", counted)
    good = pictures["red-000.png"]
    with serving(own, parallel=2, threads=2, timeout=0.15, queue=64) as number, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: post(number, "/explain", good), range(4)))  # the time of some is up, their work is not
    assert len(most) > 1
    assert set(most) == {1}


def test_class_whose_folder_is_no_text_is_named_by_its_bytes(packed, pictures, monkeypatch):
    own = Model(str(packed), False, 1)
    monkeypatch.setattr(own.predictor, "class_names", ["caf\udce9", "green", "red"])
    with serving(own) as number:
        status, answer = post(number, "/predict", pictures["blue-000.png"])
        assert (status, answer["predictions"][0]["label"]) == (200, "caf\\udce9")
        assert post(number, "/explain?target=caf%5Cudce9", pictures["blue-000.png"])[0] == 200


def test_where_maps_cannot_be_had_a_sentence_says_why(packed, pictures, monkeypatch):
    monkeypatch.setattr(attribution, "is_available", lambda: False)
    with serving(Model(str(packed), False, 1)) as number:
        status, answer = post(number, "/explain", pictures["red-000.png"])
        assert ask(number, "GET", "/")[2].count(b'data-explains="false"') == 1
    assert status == 501
    assert "pip install -e .[explain]" in answer["detail"]


def test_requests_of_a_wrong_kind_get_a_sentence(port, pictures):
    good = pictures["red-000.png"]
    body, kind = form([("a.png", good)])
    assert post(port, "/predict", b"{}", "application/json")[0] == 415
    assert post(port, "/predict", good, Content_Encoding="gzip")[0] == 415
    assert post(port, "/predict", b"") == (422, {"detail": "There is no picture in this request."})
    assert post(port, "/predict", b"--edge--\r\n", kind)[0] in (400, 422)
    assert post(port, "/predict", body[:-10], kind) == (400, {"detail": "The form ends before its last boundary."})
    assert post(port, "/predict", body, "multipart/form-data")[0] == 400
    assert post(port, "/predict", b"nothing of the kind", kind)[0] == 400
    assert post(port, "/predict", *form([("a", good)] * 9)) == (413, {"detail": "At most 8 pictures in a request."})
    assert ask(port, "GET", "/predict")[0] == 405
    assert ask(port, "GET", "/../../etc/passwd")[0] == 404
    assert ask(port, "GET", "/static/..%2fapp.py")[0] == 404
    assert post(port, "/predict", *form([("a", good)] * 8))[0] == 200


def test_form_of_padding_does_not_hold_up_the_others(model, pictures):
    body, kind = form([("a.png", pictures["red-000.png"])])
    padded = body.replace(b"--edge--", b"--edge" + b" " * 20_000_000 + b"--edge--")
    with serving(model, max_body=30_000_000) as number:
        status, answer = post(number, "/predict", padded, kind)
        assert (status, answer["detail"].partition(":")[0]) == (400, "The form is damaged")
        large = form([("a.png", pictures["red-000.png"] + bytes(25_000_000))])
        assert post(number, "/predict", *large)[0] == 200


def test_too_large_a_request_is_refused_whether_it_says_so_or_not(port):
    assert post(port, "/predict", bytes(1_000_001)) == (413, {"detail": "A request may have at most 1 MB."})
    status, answer = post(port, "/predict", iter([bytes(100_000)] * 11))
    assert (status, answer) == (413, {"detail": "A request may have at most 1 MB."})
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert ask(port, "GET", "/healthz", X="x" * 15_000)[0] == 200
    assert ask(port, "GET", "/healthz", X="x" * 20_000)[0] == 431  # though it may come in one piece


def test_token_is_asked_for_wherever_pictures_go(model, pictures):
    good = pictures["red-000.png"]
    with serving(model, token="a long secret", hosts=frozenset()) as number:
        for given in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic a long secret"}):
            for path in ("/predict", "/explain"):
                status, told, content = ask(number, "POST", path, good, Content_Type="image/png", **given)
                assert (status, told["www-authenticate"]) == (401, "Bearer")
                assert json.loads(content) == {"detail": "This server asks for a token."}
        assert post(number, "/predict", good, Authorization="Bearer a long secret")[0] == 200
        assert post(number, "/predict", good, Authorization="Bearer caf\xe9")[0] == 401
        for path in ("/", "/healthz", "/docs", "/openapi.json", "/static/page.js"):
            assert ask(number, "GET", path, Host="example.org")[0] == 200
        assert ask(number, "GET", "/other")[0] == 401


def test_other_sites_and_other_names_of_this_machine_are_refused(port, pictures):
    good, own = pictures["red-000.png"], f"127.0.0.1:{port}"
    assert post(port, "/predict", good, Host="rebound.example.org")[0] == 400
    assert post(port, "/predict", good, Origin="https://example.org")[0] == 403
    assert post(port, "/predict", good, Origin="null")[0] == 403
    assert post(port, "/predict", good, Origin="http://[")[0] == 403
    for host in ("[::1", "", "127.0.0.1.example.org", "127.0.0.1@example.org"):
        assert post(port, "/predict", good, Host=host)[0] == 400
    assert post(port, "/predict", good, Host="LOCALHOST")[0] == 200
    assert post(port, "/predict", good, Origin=f"http://{own}")[0] == 200
    status, told, _ = ask(port, "OPTIONS", "/predict", Origin=f"http://{own}", Access_Control_Request_Method="POST")
    assert status == 405
    assert not [name for name in told if name.lower().startswith("access-control")]


def test_pages_need_nothing_from_elsewhere_and_no_inline_code(port):
    for path in ("/", "/docs"):
        status, told, content = ask(port, "GET", path)
        page = content.decode()
        assert status == 200
        assert "unsafe" not in told["content-security-policy"]
        assert told["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert told["x-content-type-options"] == "nosniff"
        assert "server" not in told
        assert not re.search(r"https?://|<style|\sstyle=|\son\w+=|<script(?! src)|\$\w", page)
        for target in re.findall(r'(?:src|href)="(/static/[^"]+)"', page):
            assert ask(port, "GET", target)[0] == 200, target
    assert "http" not in ask(port, "GET", "/static/page.css")[2].decode()
    assert ask(port, "GET", "/healthz")[2] == b'{"status":"ok"}'
    description = json.loads(ask(port, "GET", "/openapi.json")[2])
    assert set(description["paths"]) == {"/predict", "/explain", "/healthz"}


def test_answers_come_without_a_pause_between_their_packets(port):
    connection, took = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(30):
        started = time.monotonic()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        took.append(time.monotonic() - started)
    connection.close()
    assert np.median(took) < 0.03  # 0.04 is what a system waits for more to acknowledge


def test_slow_talkers_and_those_who_do_not_read_are_cut_off(model, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    with serving(model) as number:
        with socket.create_connection(("127.0.0.1", number)) as connection:
            connection.settimeout(5)
            with contextlib.suppress(ConnectionError):
                for _ in range(10):
                    connection.sendall(b"GET")
                    time.sleep(0.1)
                assert connection.recv(100) == b""
        asked = b"GET /static/page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", number)) as connection:
            connection.settimeout(10)
            with pytest.raises(ConnectionError):
                connection.sendall(asked * 200_000)
        assert ask(number, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize("resets", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", ["part", "whole", "answered"])
def test_nothing_of_a_connection_is_kept_when_it_is_gone(port, pictures, resets, sent):
    good = pictures["red-000.png"]
    whole = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(good) + good
    with socket.create_connection(("127.0.0.1", port)) as connection:
        name = connection.getsockname()
        connection.sendall(whole[:-1] if sent == "part" else whole)
        if sent == "answered":
            assert connection.recv(4096)
        else:
            time.sleep(0.1)  # in which it is taken in
        if resets:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def kept():
        assert ask(port, "GET", "/healthz")[0] == 200
        gc.collect()
        return [one for one in gc.get_objects() if type(one) is server.Protocol and one.client == name]

    deadline = time.monotonic() + server.PATIENCE / 2
    while kept():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_who_reads_slowly_gets_all_and_who_does_not_is_given_up_even_at_the_end(model, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.5)
    asked = b"GET /static/page.js HTTP/1.1\r\nHost: localhost\r\n"

    def connected():
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.settimeout(10)
        made.connect(("127.0.0.1", number))
        return made

    monkeypatch.setattr(server.Protocol, "connection_made", with_small_buffers(server.Protocol.connection_made))
    with serving(model) as number, connected() as slow, connected() as deaf:
        size = len(ask(number, "GET", "/static/page.js")[2])
        slow.sendall((asked + b"\r\n") * 15)
        deaf.sendall((asked + b"\r\n") * 7 + asked + b"Connection: close\r\n\r\n")  # less than is waited for
        got, started = 0, time.monotonic()
        while got < 15 * size:
            got += len(part := slow.recv(1500))
            assert part, (got, time.monotonic() - started)
            time.sleep(0.05)
        assert time.monotonic() - started > 2 * server.PATIENCE
        held = b""
        with contextlib.suppress(ConnectionError):
            while part := deaf.recv(4096):
                held += part
        assert len(held) < 8 * size


def test_who_is_connected_when_the_end_begins_is_answered(model, monkeypatch):
    held, ends = [], server.Server.shutdown

    def connect(loop):
        """Someone new in each turn of the loop, until nobody is let in any more."""
        with contextlib.suppress(ConnectionRefusedError):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            held[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            loop.call_soon(connect, loop)

    async def shutdown(self, sockets=None):
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for _ in range(3):
            connect(asyncio.get_running_loop())
        await ends(self, sockets)

    monkeypatch.setattr(server.Server, "shutdown", shutdown)
    with serving(model) as port:
        pass
    assert len(held) >= 3
    for connection in held:
        with connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")


def with_small_buffers(connection_made):
    """Makes the system hold little of what is not read."""

    def made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection_made(self, transport)

    return made


def test_whoever_asks_before_sending_is_refused_before_sending(port):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(2)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


class Slow:
    """Holds a network back until it may go on."""

    def __init__(self, predictor):
        self.go, self.started, self.sizes, self._compute = threading.Event(), threading.Event(), [], predictor

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        self.started.set()
        assert self.go.wait(10)
        return self._compute(pixels)


@pytest.fixture
def slow(packed, monkeypatch):
    """A model whose network waits."""
    made = Model(str(packed), False, 1)
    made.slow = Slow(made.predictor.probabilities)
    monkeypatch.setattr(made.predictor, "probabilities", made.slow)
    yield made
    made.slow.go.set()


def test_full_queue_sends_away_and_answers_those_it_has_taken(slow, pictures):
    good = pictures["red-000.png"]
    with serving(slow, queue=2, max_images=2) as number, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, number, "/predict", *form([("a", good)] * 2))
        assert slow.slow.started.wait(10)
        status, told, content = ask(number, "POST", "/predict", good)
        assert (status, told["retry-after"]) == (503, "1")
        assert json.loads(content) == {"detail": "As many pictures wait as may; come back."}
        slow.slow.go.set()
        assert first.result()[0] == 200
        assert post(number, "/predict", *form([("a", good)] * 2))[0] == 200


def test_what_comes_or_takes_too_long_is_ended_and_the_next_is_answered(slow, pictures):
    good = pictures["red-000.png"]
    with serving(slow, timeout=0.5) as number:
        with socket.create_connection(("127.0.0.1", number)) as connection:
            head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nxx"
            connection.sendall(head)
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        status, told, _ = ask(number, "POST", "/predict", good)
        assert (status, told["retry-after"]) == (503, "5")
        time.sleep(0.1)  # the batch began a little after its request
        status, told, _ = ask(number, "GET", "/healthz")
        assert (status, told["retry-after"]) == (503, "60")
        slow.slow.go.set()
        assert post(number, "/predict", good)[0] == 200
        assert ask(number, "GET", "/healthz")[0] == 200


def test_pictures_of_a_client_that_has_gone_are_not_computed(slow, pictures, caplog):
    caplog.set_level(logging.INFO, "project.serve")
    good = pictures["red-000.png"]
    with serving(slow, batch_size=1) as number, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, number, "/predict", good)
        assert slow.slow.started.wait(10)
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", number)) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(good) + good
                )
                time.sleep(0.2)
        time.sleep(0.2)
        slow.slow.go.set()
        assert first.result()[0] == 200
        assert post(number, "/predict", good)[0] == 200
    assert slow.slow.sizes == [1, 1]
    assert len(re.findall("POST /predict 499", caplog.text)) == 3
    assert "A request has failed" not in caplog.text


def test_defect_of_ours_is_told_without_its_place(packed, pictures, monkeypatch, caplog):
    made = Model(str(packed), False, 1)

    def fail(_):
        raise RuntimeError(f"in {packed}/model.onnx")

    monkeypatch.setattr(made.predictor, "probabilities", fail)
    with serving(made) as number:
        status, answer = post(number, "/predict", pictures["red-000.png"])
        assert (status, answer) == (500, {"detail": "The server has failed on this request."})
        monkeypatch.undo()
        assert ask(number, "GET", "/healthz")[0] == 200
    assert "model.onnx" in caplog.text  # the log has it


def test_log_has_a_line_a_request_without_what_the_client_wrote(port, pictures, caplog):
    with caplog.at_level(logging.INFO, "project.serve"):
        post(port, "/predict", *form([("secret-name.png", pictures["red-000.png"])]))
        ask(port, "GET", "/secret%0apath")
        time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "project.serve.limits"]
    assert len(lines) == 2
    assert re.fullmatch(r"127\.0\.0\.1 POST /predict 200, \d+ bytes, \d+ ms", lines[0])
    assert re.fullmatch(r"127\.0\.0\.1 GET - 404, 0 bytes, \d+ ms", lines[1])


def pixels(_):
    return np.zeros((2, 2, 3), np.uint8)


def batcher(compute, read=pixels, **changes):
    return Batcher(read, compute, **{"batch_size": 4, "wait": 0.5, "room": 100, "cores": 2} | changes)


def run(made, work):
    async def main():
        try:
            return await work()
        finally:
            made.close()

    return asyncio.run(main())


def test_pictures_that_come_together_are_computed_together_and_answered_apart():
    sizes = []

    def compute(batch):
        sizes.append(len(batch))
        return batch[:, 0, 0, :1].astype(np.float32)

    made = batcher(compute, read=lambda content: np.full((2, 2, 3), content[0], np.uint8))

    async def work():
        return await asyncio.gather(*(made.probabilities(bytes([n])) for n in range(10)))

    assert run(made, work) == [[float(n)] for n in range(10)]
    assert sizes == [4, 4, 2]


def test_a_lone_picture_does_not_wait_for_others():
    made = batcher(lambda batch: np.zeros((len(batch), 1), np.float32), wait=5.0)

    async def work():
        started = time.monotonic()
        await made.probabilities(b"")
        return time.monotonic() - started

    assert run(made, work) < 1


def with_a_slow_picture(wait):
    """A batcher that reads b"slow" when the event is set, and the sizes of its batches."""
    held, sizes = threading.Event(), []

    def read(content):
        if content == b"slow":
            assert held.wait(10)
        return pixels(content)

    def compute(batch):
        sizes.append(len(batch))
        return np.zeros((len(batch), 1), np.float32)

    return batcher(compute, read, wait=wait), held, sizes


def test_a_picture_that_is_slow_to_read_holds_others_up_for_the_wait_only():
    made, held, sizes = with_a_slow_picture(wait=0.05)

    async def work():
        late = asyncio.create_task(made.probabilities(b"slow"))
        await asyncio.sleep(0.01)
        await made.probabilities(b"quick")
        held.set()
        await late

    run(made, work)
    assert sizes == [1, 1]


@pytest.mark.parametrize(("cores", "lanes", "most"), [(1, 1, 8), (2, 1, 8), (2, 2, 4), (4, 2, 4)])
def test_reading_and_computing_share_the_cores_and_batches_fill(cores, lanes, most):
    lock, share, used, peak, sizes = threading.Lock(), cores // lanes, 0, 0, []

    @contextlib.contextmanager
    def taking(count):
        nonlocal used, peak
        with lock:
            used += count
            peak = max(peak, used)
        time.sleep(0.01)
        yield
        with lock:
            used -= count

    def read(_):
        with taking(1):
            return pixels(_)

    def compute(batch):
        with taking(share):
            sizes.append(len(batch))
            return np.zeros((len(batch), 1), np.float32)

    made = batcher(compute, read, batch_size=16, wait=9.0, cores=cores, lanes=lanes)

    async def client():
        for _ in range(6):
            await made.probabilities(b"")

    async def work():
        await asyncio.gather(*(client() for _ in range(8)))

    run(made, work)
    assert peak == cores
    assert sum(sizes) == 48
    assert sorted(sizes)[len(sizes) // 2] >= most / 2  # eight clients ask again when they are answered
    assert max(sizes) <= 8


def test_who_goes_while_pictures_wait_does_not_harm_the_others():
    made, held, sizes = with_a_slow_picture(wait=9.0)

    async def work():
        slow, first, second = (asyncio.create_task(made.probabilities(content)) for content in (b"slow", b"1", b"2"))
        await asyncio.sleep(0.1)  # two are read and wait for the third
        second.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(made.probabilities(b"3"))
        await asyncio.sleep(0.1)
        held.set()
        return await asyncio.gather(slow, first, third)

    assert run(made, work) == [[0.0]] * 3
    assert sizes == [3]


def test_a_picture_that_is_read_without_end_is_seen_and_does_not_hold_up_the_end():
    go = threading.Event()

    def read(content):
        go.wait(20)
        return pixels(content)

    made = batcher(lambda batch: np.zeros((len(batch), 1), np.float32), read)

    async def work():
        asked = asyncio.create_task(made.probabilities(b""))
        await asyncio.sleep(0.2)
        assert made.busy() > 0.1
        asked.cancel()

    started = time.monotonic()
    run(made, work)
    assert time.monotonic() - started < 5
    go.set()


def test_a_full_batch_begins_before_more_is_read():
    order = []

    def read(content):
        order.append("read")
        return pixels(content)

    def compute(batch):
        order.append(len(batch))
        return np.zeros((len(batch), 1), np.float32)

    made = batcher(compute, read, batch_size=2, wait=9.0, cores=1)

    async def work():
        await asyncio.gather(*(made.probabilities(b"") for _ in range(5)))

    run(made, work)
    assert order == ["read", "read", 2, "read", "read", 2, "read", 1]


def test_other_work_has_its_turn_between_batches():
    order, done = [], False

    def compute(batch):
        order.append("batch")
        time.sleep(0.01)
        return np.zeros((len(batch), 1), np.float32)

    made = batcher(compute)

    async def client():
        while not done:
            await made.probabilities(b"")

    async def work():
        nonlocal done
        clients = [asyncio.create_task(client()) for _ in range(8)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(made.alone(lambda: order.append("other")), 5)
        done = True
        await asyncio.gather(*clients)

    run(made, work)
    assert "other" in order[1:-1]


def test_a_batch_that_fails_does_not_end_the_next():
    fails = [True, False]

    def compute(batch):
        if fails.pop(0):
            raise RuntimeError("once")
        return np.ones((len(batch), 1), np.float32)

    made = batcher(compute)

    async def work():
        with pytest.raises(RuntimeError, match="once"):
            await made.probabilities(b"")
        return await made.probabilities(b"")

    assert run(made, work) == [1.0]


def test_places_are_given_back_whatever_happens():
    made = batcher(lambda batch: np.zeros((len(batch), 1), np.float32), room=2)
    for _ in range(3):
        with pytest.raises(KeyError), made.admitted(2):
            raise KeyError
    with made.admitted(2), pytest.raises(Full), made.admitted(1):
        pass
    made.close()


def test_a_checkpoint_computes_one_batch_at_a_time(lively):
    with pytest.raises(UserError, match="--parallel is 2, but a checkpoint computes one batch at a time"):
        Model(str(lively), False, 2, 2)


def test_mistakes_on_the_command_line_are_told_in_a_sentence(packed, workplace, refused, monkeypatch):
    bundle = str(packed)
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        assert f"--port {number}: address already in use" in refused("serve", bundle, "--port", number)
    assert "ports go up to 65535" in refused("serve", bundle, "--port", "65536")
    assert "--port is -1" in refused("serve", bundle, "--port", "-1")
    assert "set a token in the environment variable SERVE_TOKEN" in refused(
        "serve", bundle, "--host", "0.0.0.0", "--port", "0"
    )
    assert "--host no.such.host.invalid" in refused("serve", bundle, "--host", "no.such.host.invalid", "--port", "0")
    assert "8 or more characters" in refused("serve", bundle, "--token", "short", "--port", "0")
    assert "without blanks before or after" in refused("serve", bundle, "--token", "long enough ", "--port", "0")
    assert "--queue is 4" in refused("serve", bundle, "--queue", "4")
    assert "--timeout is 0" in refused("serve", bundle, "--timeout", "0")
    assert "--batch_wait is -1" in refused("serve", bundle, "--batch_wait", "-1")
    assert "--min_confidence is 2" in refused("serve", bundle, "--min_confidence", "2")
    assert "--threads is 0" in refused("serve", bundle, "--threads", "0")
    assert "--parallel is 0" in refused("serve", bundle, "--parallel", "0")
    assert "nowhere" in refused("serve", "nowhere", "--port", "0")
    Path("bundle").mkdir()
    for file in packed.iterdir():
        Path("bundle", file.name).write_bytes(file.read_bytes())
    Path("bundle", "model.onnx").write_bytes(b"damaged")
    assert "model.onnx is damaged" in refused("serve", "bundle", "--port", "0")
