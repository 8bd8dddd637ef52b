"""A server in this process, over real connections; test_server.py has servers in processes of their own."""

import asyncio
import http.client
import io
import json
import logging
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import load
from project.data import images
from project.errors import UserError
from project.evaluation import attribution
from project.serving import app, server
from project.serving.batching import Batcher, QueueFull
from project.serving.model import Model
from project.serving.settings import Settings
from tests.conftest import COLOURS

SETTINGS = Settings(
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
    """Serves a model from a thread; yields the port."""
    settings = replace(SETTINGS, **changes)
    uvicorn = server.make(app.build(model, settings), settings)
    with server.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=uvicorn.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            uvicorn.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model(packed):
    return Model(str(packed), False, 1)


@pytest.fixture(scope="module")
def port(model):
    with serving(model) as number:
        yield number


@pytest.fixture(scope="module")
def uploads(trained):
    """Bytes of six images by name."""
    files = [file for name in COLOURS for file in sorted((trained / "photos" / name).iterdir())[:2]]
    return {f"{file.parent.name}-{file.name}": file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def image(uploads):
    return uploads["red-000.png"]


def ask(port, method, path, body=b"", **headers):
    """Status, headers and content of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def post(port, path, body, kind="application/octet-stream", **headers):
    """Status and content of a response, parsed where it is JSON."""
    status, received, content = ask(port, "POST", path, body, Content_Type=kind, **headers)
    return status, json.loads(content) if received["content-type"] == "application/json" else content


def form(files):
    """A body with files, and its type."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode() + content
        for name, content in files
    ]
    return b"\r\n".join([*parts, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"


def head(length, path="/predict", kind="application/octet-stream", more=""):
    headers = f"Host: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}"
    return f"POST {path} HTTP/1.1\r\n{headers}\r\n".encode()


def test_predictions_are_those_of_predict_from_the_same_bytes(port, packed, uploads):
    status, answer = post(port, "/predict", *form(uploads.items()))
    assert status == 200
    expected = load(packed).predict(uploads.values())
    assert answer["class_names"] == list(COLOURS)
    assert [row["name"] for row in answer["predictions"]] == list(uploads)
    for row, own, content in zip(answer["predictions"], expected, uploads.values(), strict=True):
        assert (row["label"], row["error"], row["abstained"]) == (own.label, None, False)
        assert row["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
        assert row["probability"] == max(row["probabilities"])
        status, alone = post(port, "/predict", content, "image/png")
        assert status == 200
        assert alone["predictions"][0]["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)


def test_checkpoint_predicts_like_its_bundle_and_has_another_id(lively, model, uploads):
    own = Model(str(lively), False, 1)
    assert re.fullmatch(r"squeezenet1_1-[0-9a-f]{8}", own.id)
    assert re.fullmatch(r"squeezenet1_1-[0-9a-f]{12}", model.id)
    pixels = np.stack([own.read(content) for content in uploads.values()])
    assert np.allclose(own.predictor.probabilities(pixels), model.predictor.probabilities(pixels), atol=1e-4)


def test_most_probable_classes_come_in_order_and_unsure_predictions_abstain(port, model, uploads):
    _, answer = post(port, "/predict", *form(uploads.items()))
    for row in answer["predictions"]:
        best = sorted(zip(row["probabilities"], answer["class_names"], strict=True), reverse=True)[:2]
        assert [(entry["probability"], entry["label"]) for entry in row["top"]] == best
    middle = float(np.median([row["probability"] for row in answer["predictions"]]))
    with serving(model, min_confidence=middle, top=50) as strict:
        _, again = post(strict, "/predict", *form(uploads.items()))
    abstained = [row["abstained"] for row in again["predictions"]]
    assert abstained == [row["probability"] < middle for row in answer["predictions"]]
    assert 0 < sum(abstained) < len(abstained)
    assert [len(row["top"]) for row in again["predictions"]] == [3] * 6


def test_unreadable_image_is_named_and_the_others_are_classified(port, image):
    files = [("ok.png", image), ("../../etc/passwd", b"no image"), ("half.png", image[: len(image) // 2]), ("e", b"")]
    status, answer = post(port, "/predict", *form(files))
    assert status == 200
    rows = answer["predictions"]
    assert [row["name"] for row in rows] == [name for name, _ in files]
    assert [row["label"] is None for row in rows] == [False, True, True, True]
    assert rows[1]["error"] == "not an image, or of an unknown format"
    assert rows[2]["error"]
    status, answer = post(port, "/predict", b"no image")
    assert (status, answer["predictions"][0]["error"]) == (422, "not an image, or of an unknown format")


def test_bomb_and_other_formats_are_refused_by_their_header(port):
    stream = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(stream, "PNG")
    _, answer = post(port, "/predict", stream.getvalue())
    assert f"more than the {images.MAX_PIXELS:,}" in answer["predictions"][0]["error"]
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "EPS")
    _, answer = post(port, "/predict", stream.getvalue())
    assert answer["predictions"][0]["error"] == "not an image, or of an unknown format"


@pytest.mark.parametrize("kind", ["packed", "lively"])
def test_explanation_is_the_map_over_the_image(kind, request, image):
    with serving(Model(str(request.getfixturevalue(kind)), False, 1)) as number:
        status, png = post(number, "/explain", image)
        other_status, other = post(number, "/explain?target=blue", *form([("a", image)]))
        assert post(number, "/explain?target=grey", image)[0] == 422
        assert post(number, "/explain", b"no image")[0] == 422
        assert post(number, "/explain", *form([("a", b""), ("b", b"")]))[0] == 413
    assert (status, other_status) == (200, 200)
    predicted, blue = (np.asarray(Image.open(io.BytesIO(content))) for content in (png, other))
    assert predicted.shape == blue.shape == (32, 32, 3)
    assert (predicted != blue).any()


def test_concurrent_explanations_use_the_network_one_at_a_time(packed, image, monkeypatch):
    own = Model(str(packed), False, 2, 2)
    own.network()
    running, counts, heat_maps = [], [], attribution.heat_maps

    def counted(*arguments):
        running.append(1)
        counts.append(len(running))
        time.sleep(0.4)
        running.pop()
        return heat_maps(*arguments)

    monkeypatch.setattr(attribution, "heat_maps", counted)
    with serving(own, parallel=2, threads=2, timeout=0.6, queue=64) as number, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: post(number, "/explain", image), range(4)))  # some time out while their work goes on
    assert len(counts) > 1
    assert set(counts) == {1}


def test_class_whose_folder_is_no_text_is_named_by_its_bytes(packed, uploads, monkeypatch):
    own = Model(str(packed), False, 1)
    monkeypatch.setattr(own.predictor, "class_names", ["caf\udce9", "green", "red"])
    with serving(own) as number:
        status, answer = post(number, "/predict", uploads["blue-000.png"])
        assert (status, answer["predictions"][0]["label"]) == (200, "caf\\udce9")
        assert post(number, "/explain?target=caf%5Cudce9", uploads["blue-000.png"])[0] == 200


def test_missing_heat_maps_are_explained_in_a_sentence(packed, image, monkeypatch):
    monkeypatch.setattr(attribution, "is_available", lambda: False)
    with serving(Model(str(packed), False, 1)) as number:
        status, answer = post(number, "/explain", image)
        assert ask(number, "GET", "/")[2].count(b'data-explains="false"') == 1
    assert status == 501
    assert "pip install -e .[explain]" in answer["detail"]


def test_requests_of_a_wrong_kind_get_a_sentence(port, image):
    body, kind = form([("a.png", image)])
    assert post(port, "/predict", b"{}", "application/json")[0] == 415
    assert post(port, "/predict", image, Content_Encoding="gzip")[0] == 415
    assert post(port, "/predict", b"") == (422, {"detail": "There is no image in this request."})
    assert post(port, "/predict", b"--edge--\r\n", kind)[0] in (400, 422)
    assert post(port, "/predict", body[:-10], kind) == (400, {"detail": "The form ends before its last boundary."})
    assert post(port, "/predict", body, "multipart/form-data")[0] == 400
    assert post(port, "/predict", b"nothing of the kind", kind)[0] == 400
    for count in (9, 500):
        assert post(port, "/predict", *form([("a", b"")] * count)) == (
            413,
            {"detail": "At most 8 images in a request."},
        )
    assert ask(port, "GET", "/predict")[0] == 405
    for path in ("/../../etc/passwd", "/static/..%2fapp.py", "/static/none.js"):
        assert ask(port, "GET", path)[0] == 404
    assert post(port, "/predict", *form([("a", image)] * 8))[0] == 200


def test_large_files_of_a_form_stay_in_memory(packed, monkeypatch):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    monkeypatch.setattr("tempfile.mkstemp", None)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)).save(stream, "PNG")
    with serving(Model(str(packed), False, 1), max_body=4_000_000) as number:
        status, answer = post(number, "/predict", *form([("large.png", stream.getvalue())]))
    assert len(stream.getvalue()) > 2_000_000
    assert (status, answer["predictions"][0]["error"]) == (200, None)


def test_too_large_a_request_is_refused_with_or_without_a_length(port):
    refusal = (413, {"detail": "A request may have at most 1 MB."})
    assert post(port, "/predict", bytes(1_000_001)) == refusal
    assert post(port, "/predict", iter([bytes(100_000)] * 11)) == refusal
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert ask(port, "GET", "/healthz", X="x" * 15_000)[0] == 200
    with socket.create_connection(("127.0.0.1", port)) as connection:  # before the client has sent anything
        connection.settimeout(2)
        connection.sendall(head(9_000_000, more="Expect: 100-continue\r\n"))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_token_is_needed_to_send_images(model, image):
    with serving(model, token="a long secret", hosts=frozenset()) as number:
        for given in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic a long secret"}):
            for path in ("/predict", "/explain"):
                status, headers, content = ask(number, "POST", path, image, Content_Type="image/png", **given)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(content) == {"detail": "This server needs a token."}
        assert post(number, "/predict", image, Authorization="Bearer a long secret")[0] == 200
        assert post(number, "/predict", image, Authorization="Bearer caf\xe9")[0] == 401
        for path in ("/", "/healthz", "/docs", "/openapi.json", "/static/page.js"):
            assert ask(number, "GET", path, Host="example.org")[0] == 200
        assert ask(number, "GET", "/other")[0] == 401


def test_other_sites_and_other_names_of_this_machine_are_refused(port, image):
    own = f"127.0.0.1:{port}"
    for host in ("rebound.example.org", "[::1", "", "127.0.0.1.example.org", "127.0.0.1@example.org"):
        assert post(port, "/predict", image, Host=host)[0] == 400
    for origin in ("https://example.org", "null", "http://["):
        assert post(port, "/predict", image, Origin=origin)[0] == 403
    assert post(port, "/predict", image, Host="LOCALHOST")[0] == 200
    assert post(port, "/predict", image, Origin=f"http://{own}")[0] == 200
    status, headers, _ = ask(port, "OPTIONS", "/predict", Origin=f"http://{own}", Access_Control_Request_Method="POST")
    assert status == 405
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_pages_need_nothing_from_elsewhere_and_no_inline_code(port):
    for path in ("/", "/docs"):
        status, headers, content = ask(port, "GET", path)
        page = content.decode()
        assert status == 200
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
        assert not re.search(r"https?://|<style|\sstyle=|\son\w+=|<script(?! src)|\$\w", page)
        for target in re.findall(r'(?:src|href)="(/static/[^"]+)"', page):
            assert ask(port, "GET", target)[0] == 200, target
    assert "http" not in ask(port, "GET", "/static/page.css")[2].decode()
    assert ask(port, "GET", "/healthz")[2] == b'{"status":"ok"}'
    assert set(json.loads(ask(port, "GET", "/openapi.json")[2])["paths"]) == {"/predict", "/explain", "/healthz"}


def test_responses_come_without_a_pause_between_their_packets(port):
    connection, seconds = http.client.HTTPConnection("127.0.0.1", port), []
    for _ in range(30):
        started = time.monotonic()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        seconds.append(time.monotonic() - started)
    connection.close()
    assert np.median(seconds) < 0.03  # a delayed acknowledgement takes 0.04


class Slow:
    """Holds a network back until `go` is set."""

    def __init__(self, compute):
        self.go, self.started, self.sizes, self._compute = threading.Event(), threading.Event(), [], compute

    def __call__(self, pixels):
        self.sizes.append(len(pixels))
        self.started.set()
        assert self.go.wait(10)
        return self._compute(pixels)


@pytest.fixture
def slow(packed, monkeypatch):
    """A model whose network waits."""
    model = Model(str(packed), False, 1)
    model.slow = Slow(model.predictor.probabilities)
    monkeypatch.setattr(model.predictor, "probabilities", model.slow)
    yield model
    model.slow.go.set()


def test_full_queue_refuses_more_and_answers_what_it_has_admitted(slow, image):
    with serving(slow, queue=2, max_images=2) as number, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, number, "/predict", *form([("a", image)] * 2))
        assert slow.slow.started.wait(10)
        status, headers, content = ask(number, "POST", "/predict", image)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(content) == {"detail": "The queue is full; retry later."}
        slow.slow.go.set()
        assert first.result()[0] == 200
        assert post(number, "/predict", *form([("a", image)] * 2))[0] == 200


def test_timeout_ends_a_slow_upload_and_slow_work_and_the_next_is_answered(slow, image):
    with serving(slow, timeout=0.5) as number:
        with socket.create_connection(("127.0.0.1", number)) as connection:
            connection.sendall(head(1000) + b"xx")
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        status, headers, _ = ask(number, "POST", "/predict", image)
        assert (status, headers["retry-after"]) == (503, "5")
        time.sleep(0.1)  # the batch began a little after its request
        status, headers, _ = ask(number, "GET", "/healthz")
        assert (status, headers["retry-after"]) == (503, "60")
        slow.slow.go.set()
        assert post(number, "/predict", image)[0] == 200
        assert ask(number, "GET", "/healthz")[0] == 200


def test_images_of_a_disconnected_client_are_not_computed(slow, image, caplog):
    caplog.set_level(logging.INFO, "project.serving")
    with serving(slow, batch_size=1) as number, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, number, "/predict", image)
        assert slow.slow.started.wait(10)
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", number)) as connection:
                connection.sendall(head(len(image)) + image)
                time.sleep(0.2)
        time.sleep(0.2)
        slow.slow.go.set()
        assert first.result()[0] == 200
        assert post(number, "/predict", image)[0] == 200
    assert slow.slow.sizes == [1, 1]
    assert len(re.findall("POST /predict 499", caplog.text)) == 3
    assert "A request has failed" not in caplog.text


def test_our_own_bug_is_logged_but_not_revealed(packed, image, monkeypatch, caplog):
    model = Model(str(packed), False, 1)

    def fail(_):
        raise RuntimeError(f"in {packed}/model.onnx")

    monkeypatch.setattr(model.predictor, "probabilities", fail)
    with serving(model) as number:
        assert post(number, "/predict", image) == (500, {"detail": "The server has failed on this request."})
        assert ask(number, "GET", "/healthz")[0] == 200
    assert "model.onnx" in caplog.text


def test_log_has_a_line_for_each_request_without_the_clients_words(port, image, caplog):
    with caplog.at_level(logging.INFO, "project.serving"):
        post(port, "/predict", *form([("secret-name.png", image)]))
        ask(port, "GET", "/secret%0apath")
        time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "project.serving.middleware"]
    assert len(lines) == 2
    assert re.fullmatch(r"127\.0\.0\.1 POST /predict 200, \d+ bytes, \d+ ms", lines[0])
    assert re.fullmatch(r"127\.0\.0\.1 GET - 404, 0 bytes, \d+ ms", lines[1])


class Recorder:
    """A network and a reader for a Batcher; b"held" is decoded, and with `hold` a batch computed, once `go` is set.

    Attributes:
        sizes: Of the batches.
    """

    def __init__(self, hold=False):
        self.go, self.sizes, self.hold = threading.Event(), [], hold

    def read(self, content):
        assert content != b"held" or self.go.wait(20)
        return np.full((2, 2, 3), content[0], np.uint8)

    def compute(self, batch):
        self.sizes.append(len(batch))
        assert not self.hold or self.go.wait(10)
        return batch[:, 0, 0, :1].astype(np.float32)


def run(work, recorder, **changes):
    """Runs work(batcher) in an event loop."""

    async def main():
        settings = replace(SETTINGS, **{"batch_wait": 0.5, "queue": 100, "threads": 2} | changes)
        batcher = Batcher(recorder.read, recorder.compute, settings)
        try:
            return await work(batcher)
        finally:
            batcher.close()

    return asyncio.run(main())


def tasks(batcher, *contents):
    return [asyncio.create_task(batcher.probabilities(content)) for content in contents]


def test_images_that_arrive_together_are_computed_together_and_answered_apart():
    async def work(batcher):
        return await asyncio.gather(*tasks(batcher, *(bytes([n]) for n in range(10))))

    recorder = Recorder()
    assert run(work, recorder) == [[float(n)] for n in range(10)]
    assert recorder.sizes == [4, 4, 2]


def test_a_lone_image_does_not_wait_for_others():
    run(lambda batcher: asyncio.wait_for(batcher.probabilities(b"1"), 1), Recorder(), batch_wait=5.0)


def test_an_image_that_is_slow_to_decode_delays_others_by_the_wait_only():
    async def work(batcher):
        (held,) = tasks(batcher, b"held")
        await asyncio.sleep(0.01)
        await batcher.probabilities(b"1")
        recorder.go.set()
        await held

    recorder = Recorder()
    run(work, recorder, batch_wait=0.05)
    assert recorder.sizes == [1, 1]


def test_a_client_that_disconnects_while_images_wait_does_not_affect_the_others():
    async def work(batcher):
        held, first, second = tasks(batcher, b"held", b"1", b"2")
        await asyncio.sleep(0.1)  # two are decoded and wait for the third
        second.cancel()
        await asyncio.sleep(0)
        (third,) = tasks(batcher, b"3")
        await asyncio.sleep(0.1)
        recorder.go.set()
        return await asyncio.gather(held, first, third)

    recorder = Recorder()
    assert run(work, recorder, batch_wait=9.0) == [[float(b"h"[0])], [float(b"1"[0])], [float(b"3"[0])]]
    assert recorder.sizes == [3]


def test_a_client_that_disconnects_while_its_batch_is_computed_does_not_affect_the_others():
    async def work(batcher):
        first, second = tasks(batcher, b"1", b"2")
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        recorder.go.set()
        return await second

    recorder = Recorder(hold=True)
    assert run(work, recorder) == [float(b"2"[0])]


def test_an_image_that_is_decoded_without_end_is_noticed_and_does_not_delay_the_shutdown():
    async def work(batcher):
        (held,) = tasks(batcher, b"held")
        await asyncio.sleep(0.2)
        assert batcher.busy() > 0.1
        held.cancel()

    recorder, started = Recorder(), time.monotonic()
    run(work, recorder)
    assert time.monotonic() - started < 5
    recorder.go.set()


def test_other_work_has_its_turn_between_batches():
    async def work(batcher):
        async def client():
            while True:
                await batcher.probabilities(b"1")

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await asyncio.sleep(0.1)
        before = await asyncio.wait_for(batcher.run(lambda: len(recorder.sizes)), 5)
        await asyncio.sleep(0.1)
        for task in clients:
            task.cancel()
        return before

    recorder = Recorder()
    assert 0 < run(work, recorder) < len(recorder.sizes)


def test_a_batch_that_fails_does_not_fail_the_next(monkeypatch):
    async def work(batcher):
        monkeypatch.setattr(batcher, "_compute", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await batcher.probabilities(b"1")
        monkeypatch.undo()
        return await batcher.probabilities(b"1")

    assert run(work, Recorder()) == [float(b"1"[0])]


def test_room_in_the_queue_is_freed_whatever_happens():
    async def work(batcher):
        for _ in range(3):
            with pytest.raises(KeyError), batcher.admitted(2):
                raise KeyError
        with batcher.admitted(2), pytest.raises(QueueFull), batcher.admitted(1):
            pass

    run(work, Recorder(), queue=2)


def test_a_checkpoint_computes_one_batch_at_a_time(lively):
    with pytest.raises(UserError, match="--parallel is 2, but a checkpoint computes one batch at a time"):
        Model(str(lively), False, 2, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--port 65536", "--port is 65536; it must be at most 65535"),
        ("--port -1", "--port is -1; it must be at least 0"),
        ("--host 0.0.0.0", "set a token in the environment variable SERVE_TOKEN"),
        ("--host no.such.host.invalid", "--host no.such.host.invalid"),
        ("--token short", "8 or more characters"),
        ("--queue 4", "--queue is 4"),
        ("--timeout 0", "--timeout is 0"),
        ("--batch_wait -1", "--batch_wait is -1"),
        ("--min_confidence 2", "--min_confidence is 2"),
        ("--threads 0", "--threads is 0"),
        ("--parallel 0", "--parallel is 0"),
    ],
)
def test_mistakes_on_the_command_line_get_a_sentence(packed, workplace, refused, monkeypatch, options, sentence):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    assert sentence in refused(
        "serve", str(packed), *(() if "--port" in options else ("--port", "0")), *options.split()
    )


def test_what_cannot_be_served_gets_a_sentence(packed, workplace, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        assert f"--port {number}: address already in use" in refused("serve", str(packed), "--port", number)
    assert "without blanks before or after" in refused("serve", str(packed), "--token", "long enough ", "--port", "0")
    assert "nowhere" in refused("serve", "nowhere", "--port", "0")
    shutil.copytree(packed, "bundle")
    Path("bundle", "model.onnx").write_bytes(b"damaged")
    assert "model.onnx is damaged" in refused("serve", "bundle", "--port", "0")
