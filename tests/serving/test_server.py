"""Servers in processes of their own: under load, abused, ended by signals, in a browser, and without torch."""

import contextlib
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from benchmarks import serve as bench
from tests.serving.test_app import ask, form, head, post

ROOT = Path(__file__).parents[2]


def port_of(process):
    return next(int(found[1]) for line in process.stdout if (found := re.match(r"http://\S+:(\d+)", line)))


@pytest.fixture
def served(packed, tmp_path):
    """A server of a bundle, in a process; its port, the process, its log and a folder that it may write into."""
    folder = tmp_path / "folder"
    (folder / "tmp").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment["TMPDIR"] = str(folder / "tmp")
    command = [sys.executable, "-m", "project.cli", "serve", str(packed), "--port", "0"]
    command += ["--timeout", "10", "--max_body", "4", "--threads", "1"]
    streams = {"stdout": subprocess.PIPE, "stderr": (tmp_path / "log").open("w"), "text": True}
    with streams["stderr"], subprocess.Popen(command, cwd=folder, env=environment, **streams) as process:
        yield port_of(process), process, tmp_path / "log", folder
        process.kill()


@pytest.fixture
def image(trained):
    return (trained / "photos" / "red" / "000.png").read_bytes()


def test_bundle_is_served_without_torch_and_without_telling_its_runtimes_maker(served, image):
    port, process, _, folder = served
    assert post(port, "/predict", image)[0] == 200
    loaded = {part for file in psutil.Process(process.pid).memory_maps() for part in Path(file.path).parts}
    assert {name for name in loaded if name in ("onnxruntime", "torch", "matplotlib", "scipy")} == {"onnxruntime"}
    process.terminate()
    assert process.wait(20) == 143
    assert not list((folder / "tmp").iterdir())  # where the runtime would keep the number of a session


def send_until_closed(port, content, keep_alive):
    """Sends one request after the other until the server closes the connection; counts the responses by status."""
    answered, connection = Counter(), http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError), contextlib.closing(connection):
        while True:
            connection.request("POST", "/predict", content)
            response = connection.getresponse()
            response.read()
            answered[response.status] += 1
            if response.getheader("connection") == "close":
                break
            if not keep_alive:
                connection.close()  # opened again by the next request
    return answered


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_requests_that_have_begun_are_answered_after_a_signal(served, image, number):
    port, process, log, _ = served
    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(send_until_closed, port, image, keep_alive=index % 2 == 0) for index in range(16)]
        time.sleep(1)
        process.send_signal(number)
        answered = sum((client.result() for client in clients), Counter())
    assert process.wait(20) == 128 + number
    # each request in the log was answered in full; the others were not accepted any more
    assert set(answered) == {200}
    assert answered[200] == len(re.findall(r"POST /predict", log.read_text())) > 32
    assert "Traceback" not in log.read_text()


def resident(process):
    return psutil.Process(process.pid).memory_info().rss


@pytest.mark.slow
def test_load_has_no_errors_below_the_queue_and_only_503_above_and_memory_stays(served, packed, image):
    port, process, _, _ = served
    requests = [bench.request(image)]
    bench.load(port, requests, 64, 1)
    before = resident(process)
    for clients in (1, 8, 64):
        made = bench.load(port, requests, clients, 1)
        assert set(made.statuses) == {200}, clients
        assert len(made.latencies) == made.statuses[200] > 10
    assert resident(process) < before + 20e6
    with bench.server(packed, "--queue", "4", "--max_images", "4") as (small, _):
        assert set(bench.load(small, requests, 64, 1).statuses) == {200, 503}
        assert set(bench.load(small, requests, 1, 1).statuses) == {200}


def send(port, content):
    """Sends bytes; the status of the response, or None where the connection ends without one."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR) if content.endswith(b"\n\n") else None
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", connection.recv(4096))
        return int(found[1]) if found else None


def mutated(content, chance):
    """Some bytes are changed, removed or repeated."""
    mutant = bytearray(content)
    for _ in range(chance.randint(1, 20)):
        start, length = chance.randrange(len(mutant)), chance.randint(1, 50)
        replacement = chance.choice([chance.randbytes(length), b"", mutant[start : start + length] * 2])
        mutant[start : start + length] = replacement
        mutant = mutant or bytearray(b"x")
    return bytes(mutant)


def abuse(chance, samples):
    """One request that no client should send."""

    def upload(content, kind="application/octet-stream", more=""):
        return head(len(content), path, kind, more) + content

    choice, length = chance.choice, chance.randrange
    path = choice(["/predict", "/predict", "/predict", "/explain", "/explain?target=red"])
    sample = choice(samples)
    name = choice(["a", "../../x", "/etc/passwd", "C:\\x", "\\\\h\\x", "%00", "n" * 3000])
    body, kind = form([(name, sample)])
    host = choice(["[", "[::1", "a b", "\\", "localhost:99999999", "\xff", "@", ""])
    lengths = ["-1", "1e3", "0x10", "9" * 40, "5, 5", "", "٣"]
    chunked = head(0, path).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = [b"zz\r\n", b"ffffffffff\r\n", b"5\r\nabc", b"-1\r\n", b"1;" + b"x" * 70_000]
    targets = ["/../../etc/passwd", "/static/../app.py", "/%00", "//", "/static/%2e%2e", "/" + "a" * 9000]
    boundary = choice(["", "x" * 300, '"', "edge; boundary=other", "\x00"])
    kinds = ["text/html", "application/json", "multipart/mixed", "image", "", "\x7f", "multipart/form-data"]
    return choice(
        [
            lambda: upload(mutated(body, chance), kind),
            lambda: upload(mutated(sample, chance)),
            lambda: upload(sample[: length(1, len(sample))]),
            lambda: upload(sample, choice(kinds)),
            lambda: head(0, path, more="X: " + "y" * length(200_000) + "\r\n"),
            lambda: upload(sample)[: length(len(sample))] + b"\n\n",  # and disconnects
            lambda: chance.randbytes(length(1, 5000)) + b"\r\n\r\n\n\n",
            lambda: head(0, path).replace(b"Length: 0", f"Length: {choice(lengths)}".encode()) + b"\n\n",
            lambda: chunked + choice(chunks) + b"\r\n\r\n\n\n",
            lambda: head(0, choice(targets)).replace(b"POST", b"GET"),
            lambda: head(0, path).replace(b"POST", choice([b"PUT", b"TRACE", b"CONNECT", b"HEAD", b"BREW", b"get"])),
            lambda: upload(sample, more="Upgrade: websocket\r\nConnection: Upgrade\r\n"),
            lambda: upload(*form([(str(n), sample[:50]) for n in range(length(30, 300))])),
            lambda: head(length(4_000_001, 60_000_000), path) + bytes(length(100_000)) + b"\n\n",
            lambda: upload(sample) * 3,  # the next request before the response
            lambda: upload(sample, more=f"Origin: {host}\r\n").replace(b": localhost", f": {host}".encode(), 1),
            lambda: upload(body, f"multipart/form-data; boundary={boundary}"),
        ]
    )()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "count", [pytest.param(500, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.full)]
)
def test_abuse_brings_no_crash_no_failure_no_file_and_no_growth(served, image, count):
    port, process, log, folder = served
    samples, statuses, before = [image], Counter(), 0
    for kind in ("JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF"):
        Image.new("RGB", (64, 64)).save(stream := io.BytesIO(), kind)
        samples.append(stream.getvalue())
    with ThreadPoolExecutor(8) as pool, contextlib.ExitStack() as stack:
        for number in range(40):  # connections that send a part of a request do not delay the others
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            idle.sendall(head(len(image))[: 20 + 5 * number])
        for first in range(0, count, 100):
            requests = [abuse(random.Random(number), samples) for number in range(first, first + 100)]
            statuses.update(pool.map(lambda content: send(port, content), requests))
            status, answer = post(port, "/predict", image)
            assert (status, answer["predictions"][0]["error"]) == (200, None)
            if first == count // 3 // 100 * 100:
                before = resident(process)
    growth = resident(process) - before
    print(f"{count:,} requests: {dict(statuses)}; memory {before / 1e6:.0f} MB, {growth / 1e6:+.1f} MB")
    assert process.poll() is None
    assert {status for status in statuses if status and status >= 500} <= {503}
    assert {200, 400, 404, 405, 413, 415, 422} <= set(statuses)
    assert "Traceback" not in log.read_text()
    assert "failed" not in log.read_text()
    assert not [file for file in folder.rglob("*") if file.is_file()]
    assert growth < 50e6
    assert post(port, "/predict", image)[0] == 200


@pytest.mark.full
def test_server_does_what_its_own_description_says(served, image, tmp_path):
    port = served[0]
    post(port, "/explain", image)  # which loads torch
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
    # a description cannot say that bytes must be an image, or a word one of the classes
    options = ["--exclude-checks", "positive_data_acceptance", "--max-examples", "50", "--seed", "1", "--no-color"]
    made = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stdout[-5000:] + made.stderr


def until(browser, script):
    deadline = time.monotonic() + 60
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, (script, browser.execute_script("return document.body.innerText"))
        time.sleep(0.1)
    return found


def choose(browser, files):
    browser.find_element("id", "files").send_keys("\n".join(map(str, files)))


VERDICTS = "[...document.querySelectorAll('.verdict')].map((one) => one.textContent)"
DONE = f"{VERDICTS}.every((text) => text !== '…') && {VERDICTS}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_page_labels_images_that_are_chosen_dropped_or_pasted_and_names_bad_ones(served, browser, trained, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    browser.get(f"http://127.0.0.1:{served[0]}/")
    assert "No images yet" in browser.find_element("id", "empty").text
    for expected in ("files", "HTTP API"):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        focused = browser.switch_to.active_element
        assert expected in (focused.get_attribute("id"), focused.text)
    unnamed = "[...document.querySelectorAll('input, button')].filter((o) => !o.labels.length && !o.textContent)"
    assert not browser.execute_script(f"return {unnamed}")
    photos = [sorted((trained / "photos" / name).iterdir())[0] for name in ("red", "green", "blue")]
    choose(browser, photos)
    verdicts = until(browser, DONE)
    expected = post(served[0], "/predict", *form([(file.name, file.read_bytes()) for file in photos]))[1]["predictions"]
    assert verdicts == [f"{one['label']}, {100 * one['probability']:.1f} %" for one in expected]
    bars = "[...document.querySelectorAll('li:first-child .track div')].map((b) => parseFloat(b.style.width))"
    probabilities = [100 * one["probability"] for one in expected[0]["top"]]
    assert browser.execute_script(f"return {bars}")[:3] == pytest.approx(probabilities, abs=0.01)
    assert browser.find_element("id", "model").text.startswith("squeezenet1_1-")
    for script in ("one.alt.includes('evidence for') && one.naturalWidth === 32", "one.naturalWidth === 40"):
        browser.find_element("id", "explain").click()
        until(browser, f"[...document.images].every((one) => {script})")

    bad = tmp_path / "notes.txt"
    bad.write_text("no image")
    choose(browser, [bad])
    assert until(browser, DONE)[-1] == "Not classified: not an image, or of an unknown format"
    assert browser.find_element("id", "status").text == "4 of 4 images done, 1 failed"
    for kind in ("drop", "paste"):  # as a browser tells it
        browser.execute_async_script(
            """
            const [kind, done] = arguments;
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [40, 30];
            canvas.getContext("2d").drawImage(document.images[0], 0, 0);
            canvas.toBlob((blob) => {
              const data = new DataTransfer();
              data.items.add(new File([blob], `${kind}.png`, {type: "image/png"}));
              const event = kind === "drop" ? new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent(kind, {clipboardData: data, bubbles: true});
              document.body.dispatchEvent(event);
              done();
            });
            """,
            kind,
        )
    assert until(browser, DONE)[-2:] == [verdicts[0]] * 2
    browser.find_element("id", "clear").click()
    assert until(browser, "document.querySelectorAll('#results > li').length === 0")
    assert browser.find_element("id", "empty").is_displayed()
    errors = [entry for entry in browser.get_log("browser") if entry["source"] != "network"]
    assert not errors  # neither a refusal by the content-security policy nor an error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_page_takes_twenty_images_at_once_on_a_phone_and_says_when_nobody_answers(served, browser, trained):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(f"http://127.0.0.1:{served[0]}/")
    photos = sorted((trained / "photos").rglob("*.png"))[:20]
    choose(browser, photos)
    assert len(until(browser, DONE)) == 20
    assert browser.find_element("id", "status").text == "20 of 20 images done"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    heights = "[...document.querySelectorAll('button, .button, #heat')].map((one) => one.offsetHeight)"
    assert min(height for height in browser.execute_script(f"return {heights}") if height) >= 44
    served[1].kill()
    served[1].wait()
    choose(browser, photos[:1])
    assert until(browser, DONE)[-1] == "The server cannot be reached."
    assert browser.find_element("css selector", "li:last-child .retry").is_displayed()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_dockerfile_installs_serves_a_bundle(packed, image, tmp_path, monkeypatch):
    """In a fresh environment with the packages of its RUN line, and this project without those it depends on."""
    app, venv, dockerfile = tmp_path / "app", tmp_path / "venv", (ROOT / "Dockerfile").read_text()
    app.mkdir()
    for sources in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        for source in map(ROOT.joinpath, sources.split()):
            (shutil.copytree if source.is_dir() else shutil.copy)(source, app / source.name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    monkeypatch.setenv("PATH", f"{venv}/bin:{Path(sys.executable).parent}", prepend=":")
    monkeypatch.setenv("PIP_PYTHON", str(venv))  # pip itself is this environment's
    monkeypatch.setenv("SERVE_TOKEN", "long enough")
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    (line,) = re.findall(r"^RUN (pip install .*?)\\\n *&& useradd", dockerfile, re.MULTILINE | re.DOTALL)
    subprocess.run(line.replace("--no-cache-dir", "--quiet --no-compile"), shell=True, check=True, cwd=app)
    words = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)[1])
    command = [str(packed) if word == "/bundle" else word for word in words] + ["--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            port = port_of(process)
            assert post(port, "/predict", image)[0] == 401
            status, answer = post(port, "/predict", image, Authorization="Bearer long enough")
            assert (status, answer["predictions"][0]["error"]) == (200, None)
            status, answer = post(port, "/explain", image, Authorization="Bearer long enough")
            assert (status, answer["detail"]) == (501, "This server has no torch, which heat maps need.")
            assert ask(port, "GET", "/static/page.js")[0] == 200
        finally:
            process.terminate()
        assert process.wait() == 143
