"""A server in this process, over real connections; test_server.py has servers in processes of their own."""

import asyncio
import http.client
import importlib.util
import io
import json
import logging
import re
import shlex
import shutil
import socket
import threading
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image

from project import load
from project.commands.serve import LogFormatter
from project.data import images
from project.errors import UserError
from project.evaluation import attribution
from project.inference import calibration
from project.serving import app
from project.serving.app import listen, server
from project.serving.batching import Batcher
from project.serving.model import Model
from project.serving.settings import Settings
from tests.conftest import COLOURS

SETTINGS = Settings(
    token=None,
    hosts=["127.0.0.1", "localhost"],
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
    uvicorn = server(model, settings)
    with listen("127.0.0.1", 0) as listening:
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
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


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


@pytest.mark.parametrize(("kind", "top"), [("packed", 2), ("lively", 50)])
def test_predictions_are_those_of_predict_from_the_same_bytes_and_unsure_ones_abstain(kind, top, request, uploads):
    path = str(request.getfixturevalue(kind))
    expected = load(path).predict(uploads.values())
    middle = float(np.median([own.probability for own in expected]))
    with serving(Model(path, False, 1), min_confidence=middle, top=top) as number:
        status, answer = post(number, "/predict", *form(uploads.items()))
        alone = [post(number, "/predict", content, "image/png")[1]["predictions"] for content in uploads.values()]
    assert (status, answer["class_names"]) == (200, list(COLOURS))
    assert re.fullmatch(r"squeezenet1_1-[0-9a-f]{8,12}", answer["model"])
    assert [row["name"] for row in answer["predictions"]] == list(uploads)
    for row, (same,), own in zip(answer["predictions"], alone, expected, strict=True):
        assert (row["label"], row["error"], row["abstained"]) == (own.label, None, own.probability < middle)
        for answered in (row, same):
            assert answered["probabilities"] == pytest.approx(own.probabilities, abs=1e-6)
        best = sorted(zip(row["probabilities"], answer["class_names"], strict=True), reverse=True)[:top]
        assert [(entry["probability"], entry["label"]) for entry in row["top"]] == best
        assert row["probability"] == best[0][0]


def test_unreadable_image_is_named_and_the_others_are_classified(port, image):
    bomb, foreign = io.BytesIO(), io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    Image.new("RGB", (8, 8)).save(foreign, "EPS")
    large, unknown = f"more than the {images.MAX_PIXELS:,}", "not an image, or of an unknown format"
    files = {"ok.png": image, "../../etc/passwd": b"no image", "bomb": bomb.getvalue(), "eps": foreign.getvalue()}
    files |= {"half.png": image[: len(image) // 2], "empty": b""}
    status, answer = post(port, "/predict", *form(files.items()))
    assert status == 200
    rows = answer["predictions"]
    assert [row["name"] for row in rows] == list(files)
    assert [row["label"] is None for row in rows] == [False, True, True, True, True, True]
    assert (rows[1]["error"], large in rows[2]["error"], rows[3]["error"]) == (unknown, True, unknown)
    status, answer = post(port, "/predict", b"no image")
    assert (status, answer["predictions"][0]["error"]) == (422, unknown)


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
    running, counts, heat_maps = [], [], attribution.heat_maps

    def counted(*arguments):
        running.append(1)
        counts.append(len(running))
        time.sleep(0.1)
        running.pop()
        return heat_maps(*arguments)

    monkeypatch.setattr(attribution, "heat_maps", counted)
    with serving(Model(str(packed), False, 2, 2), parallel=2, threads=2) as number, ThreadPoolExecutor(4) as pool:
        assert {status for status, _ in pool.map(lambda _: post(number, "/explain", image), range(4))} == {200}
    assert counts == [1] * 4


@pytest.mark.parametrize("calibrated", [False, True])
def test_page_and_predictions_say_whether_probabilities_are_calibrated(lively, tmp_path, image, calibrated):
    path = Path(shutil.copy(lively / "checkpoints" / "best.ckpt", tmp_path))
    calibration.write(path, 2.0)
    with serving(Model(str(path), calibrated, 1)) as number:
        assert f"{'Calibrated' if calibrated else 'Raw'} probabilities" in ask(number, "GET", "/")[2].decode()
        answer = post(number, "/predict", image)[1]
    assert answer["calibrated"] == calibrated
    (expected,) = load(path, calibrated).predict([image])
    assert answer["predictions"][0]["probability"] == pytest.approx(expected.probability, abs=1e-6)


def test_class_whose_folder_is_no_text_is_named_by_its_bytes(model, uploads, monkeypatch):
    monkeypatch.setattr(model.predictor, "class_names", ["caf\udce9", "green", "red"])
    with serving(model) as number:
        status, answer = post(number, "/predict", uploads["blue-000.png"])
        assert (status, answer["predictions"][0]["label"]) == (200, "caf\\udce9")
        assert post(number, "/explain?target=caf%5Cudce9", uploads["blue-000.png"])[0] == 200


def test_missing_heat_maps_are_explained_in_a_sentence(packed, image, monkeypatch):
    def refuse(*_):
        raise UserError("There are no maps.")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "captum" else find(name))
    with serving(Model(str(packed), False, 1)) as number:
        sentence = "This server has no captum, which heat maps need."
        assert post(number, "/explain", image) == (501, {"detail": sentence})
        assert ask(number, "GET", "/")[2].count(b'data-explains="false"') == 1
    monkeypatch.undo()
    monkeypatch.setattr(attribution, "heat_maps", refuse)
    with serving(Model(str(packed), False, 1)) as number:
        assert "it has no spatial maps" in post(number, "/explain", image)[1]["detail"]


def test_requests_of_a_wrong_kind_get_a_sentence(port, image):
    body, kind = form([("a.png", image)])
    assert post(port, "/predict", b"{}", "application/json")[0] == 415
    assert post(port, "/predict", b"") == (422, {"detail": "There is no image in this request."})
    assert post(port, "/predict", body, "multipart/form-data") == (400, {"detail": "Missing boundary in multipart."})
    many = form([("a", b"")] * 5000)[0]
    for content, expected in ((b"nothing of the kind", 400), (b"--edge--\r\n", 422), (many, 400)):
        status, answer = post(port, "/predict", content, kind)
        assert (status, bool(answer["detail"])) == (expected, True)
    for count in (9, 500):
        refusal = (413, {"detail": "At most 8 images in a request."})
        assert post(port, "/predict", *form([("a", b"")] * count)) == refusal
    assert ask(port, "GET", "/predict")[0] == 405
    for path in ("/../../etc/passwd", "/static/..%2fapp.py", "/static/none.js"):
        assert ask(port, "GET", path)[0] == 404


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
    with serving(model, token="a long secret", hosts=[]) as number:
        for given in ({}, {"Authorization": "Bearer another"}, {"Authorization": "Basic a long secret"}):
            for path in ("/predict", "/explain"):
                status, headers, content = ask(number, "POST", path, image, Content_Type="image/png", **given)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(content) == {"detail": "This server needs a token."}
        assert post(number, "/predict", image, Authorization="Bearer a long secret")[0] == 200
        assert post(number, "/predict", image, Authorization="Bearer caf\xe9")[0] == 401
        for path in ("/", "/healthz", "/docs", "/openapi.json", "/static/page.js"):
            assert ask(number, "GET", path, Host="example.org")[0] == 200


def test_other_names_of_this_machine_are_refused_and_other_sites_cannot_read(port, image):
    for host in ("rebound.example.org", "[::1", "", "127.0.0.1.example.org", "127.0.0.1@example.org"):
        assert post(port, "/predict", image, Host=host)[0] == 400
    any_case = Version(version("starlette")) >= Version("1.9")  # older ones also refuse names in capitals
    assert post(port, "/predict", image, Host="LOCALHOST")[0] == (200 if any_case else 400)
    origin = "https://example.org"
    status, headers, _ = ask(port, "OPTIONS", "/predict", Origin=origin, Access_Control_Request_Method="POST")
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
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:

        def get():
            connection.request("GET", "/healthz")
            connection.getresponse().read()

        # a delayed acknowledgement takes 0.04
        assert np.median(timeit.repeat(get, number=1, repeat=30)) < 0.03


@pytest.fixture
def slow(packed, monkeypatch):
    """A model whose network waits for `go`."""
    model, go, started = Model(str(packed), False, 1), threading.Event(), threading.Event()
    compute = model.predictor.probabilities

    def wait(pixels):
        started.set()
        assert go.wait(10)
        return compute(pixels)

    monkeypatch.setattr(model.predictor, "probabilities", wait)
    model.go, model.started = go, started
    yield model
    go.set()


def test_full_queue_or_memory_refuses_more_and_answers_what_it_has_admitted(slow, image, monkeypatch):
    with serving(slow, queue=2, max_images=2) as number, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, number, "/predict", *form([("a", image)] * 2))
        assert slow.started.wait(10)
        for sentence in ("The queue is full; retry later.", "Too many requests at once; retry later."):
            status, headers, content = ask(number, "POST", "/predict", image)
            assert (status, headers["retry-after"], json.loads(content)) == (503, "1", {"detail": sentence})
            monkeypatch.setattr(app, "BODIES", 0)
        monkeypatch.undo()
        slow.go.set()
        assert first.result()[0] == 200
        assert post(number, "/predict", *form([("a", image)] * 2))[0] == 200


def test_timeout_ends_a_slow_upload_and_slow_work_and_the_next_is_answered(slow, image):
    with serving(slow, timeout=0.5) as number:
        with socket.create_connection(("127.0.0.1", number)) as connection:
            connection.sendall(head(1000) + b"xx")
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        for method, path, seconds in (("POST", "/predict", "5"), ("GET", "/healthz", "60")):
            status, headers, _ = ask(number, method, path, image)
            assert (status, headers["retry-after"]) == (503, seconds)
            time.sleep(0.1)  # the batch began a little after its request
        slow.go.set()
        assert post(number, "/predict", image)[0] == 200
        assert ask(number, "GET", "/healthz")[0] == 200


def test_disconnected_client_leaves_no_trace_in_the_log_and_frees_the_queue(slow, image, caplog):
    with serving(slow, queue=8) as number:
        for content in (b"xx", image):
            with socket.create_connection(("127.0.0.1", number)) as connection:
                connection.sendall(head(len(image)) + content)
                time.sleep(0.1)
        slow.go.set()
        assert post(number, "/predict", image)[0] == 200
        assert post(number, "/predict", *form([("a", image)] * 8))[0] == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_our_own_bug_is_logged_but_not_revealed_and_the_next_batch_is_computed(
    model, packed, image, monkeypatch, caplog
):
    broken = Mock(side_effect=RuntimeError(f"in {packed}/model.onnx"))
    steps = iter([broken, model.predictor.probabilities])
    monkeypatch.setattr(model.predictor, "probabilities", lambda pixels: next(steps)(pixels))
    with serving(model) as number:
        assert post(number, "/predict", image) == (500, b"Internal Server Error")
        assert post(number, "/predict", image)[0] == 200
    assert "model.onnx" in caplog.text


def test_log_has_a_line_for_each_request_without_the_names_of_files_and_queries(port, image, caplog):
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        post(port, "/predict", *form([("secret-name.png", image)]))
        ask(port, "GET", "/a%0apath?token=a%20secret")
    lines = [record.getMessage().split(" ", 1)[1] for record in caplog.records]
    assert lines == ['- "POST /predict HTTP/1.1" 200', '- "GET /a%0Apath?token=a%20secret HTTP/1.1" 404']
    shown = LogFormatter("%(asctime)s %(message)s").format(caplog.records[1])
    assert re.search(r"\d GET /a%0Apath: status 404, client 127\.0\.0\.1:\d+$", shown)


class Recorder:
    """A network and a reader for a Batcher; b"held" is decoded once `go` is set, batches are computed after `hold`."""

    def __init__(self, hold=None):
        self.go, self.sizes, self.hold = threading.Event(), [], hold

    def read(self, content):
        assert content != b"held" or self.go.wait(20)
        return np.full((2, 2, 3), content[0], np.uint8)

    def compute(self, batch):
        self.sizes.append(len(batch))
        assert self.hold is None or self.hold.wait(10)
        return batch[:, 0, 0, :1].astype(np.float32)

    def run(self, work, batch_wait=0.5):
        """Runs work(start) in an event loop; start(*contents) starts their computation and returns the tasks."""

        async def main():
            batcher = Batcher(self.read, self.compute, replace(SETTINGS, batch_wait=batch_wait, queue=100, threads=2))
            return await work(lambda *all: [asyncio.create_task(batcher.probabilities(one)) for one in all])

        return asyncio.run(main())


def test_images_that_arrive_together_are_computed_together_and_answered_apart():
    async def work(start):
        return await asyncio.gather(*start(*(bytes([n]) for n in range(10))))

    recorder = Recorder()
    assert recorder.run(work) == [[float(n)] for n in range(10)]
    assert recorder.sizes == [4, 4, 2]


@pytest.mark.parametrize("wait", [0.05, 9.0])
def test_an_image_waits_for_others_that_are_being_decoded_but_not_long(wait):
    async def work(start):
        await asyncio.wait_for(*start(b"1"), 5)  # alone
        held, other = start(b"held", b"1")
        await asyncio.sleep(0.3)
        assert other.done() == (wait < 1)
        recorder.go.set()
        await asyncio.gather(held, other)

    recorder = Recorder()
    recorder.run(work, wait)
    assert recorder.sizes == ([1, 1, 1] if wait < 1 else [1, 2])


def test_a_request_that_times_out_does_not_affect_the_others():
    async def work(start):
        held, first, second = start(b"held", b"1", b"2")
        await asyncio.sleep(0.1)  # two are decoded and wait for the third
        second.cancel()
        await asyncio.sleep(0)
        (third,) = start(b"3")
        await asyncio.sleep(0.1)
        recorder.go.set()
        await asyncio.sleep(0.1)  # the batch is being computed
        first.cancel()
        recorder.hold.set()
        return await asyncio.gather(held, third)

    recorder = Recorder(hold=threading.Event())
    assert recorder.run(work, batch_wait=9.0) == [[float(b"h"[0])], [float(b"3"[0])]]
    assert recorder.sizes == [3]


def test_mistakes_on_the_command_line_get_a_sentence(packed, lively, workplace, refused, monkeypatch):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    shutil.copytree(packed, "bundle")
    Path("bundle", "model.onnx").write_bytes(b"damaged")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        for model, options, sentence in (
            (packed, f"--port {number}", f"--port {number}: Address already in use"),
            (packed, "--port 65536", "--port is 65536; it must be at most 65535"),
            (packed, "--port -1", "--port is -1; it must be at least 0"),
            (packed, "--port 0 --host 0.0.0.0", "set a token in the environment variable SERVE_TOKEN"),
            (packed, "--port 0 --host no.such.host.invalid", "--host no.such.host.invalid"),
            (packed, "--port 0 --token short", "8 or more printable ASCII characters"),
            (packed, "--port 0 --token 'long enough '", "without blanks at its ends"),
            (packed, "--port 0 --queue 4", "--queue is 4"),
            (packed, "--port 0 --timeout 0", "--timeout is 0"),
            (lively, "--port 0 --parallel 2", "--parallel is 2, but a checkpoint computes one batch at a time"),
            ("nowhere", "--port 0", "nowhere"),
            ("bundle", "--port 0", "model.onnx is damaged"),
        ):
            assert sentence in refused("serve", str(model), *shlex.split(options))
