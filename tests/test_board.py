"""What TensorBoard shows: figures.py, and a real TensorBoard in a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from project import figures

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_image_grid_has_a_title_over_each_picture():
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    titles = [f"class $_{n}" for n in range(10)]
    figure = figures.image_grid(images, titles, columns=4, wrong=[n == 3 for n in range(10)])
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == titles
    for shown, text, image in zip(axes.images, axes.texts, images, strict=True):
        assert (shown.get_array() == image).all()
        left, right, bottom, top = shown.get_extent()
        assert left < text.get_position()[0] < right
        assert top - 0.1 < text.get_position()[1] < top < bottom
    (mark,) = axes.patches
    assert mark.get_xy() == (axes.images[3].get_extent()[0], axes.images[3].get_extent()[3])


@pytest.fixture
def board(at_trained):
    """A real TensorBoard on the trained run; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["sh", str(Path(__file__).parent.parent / "scripts" / "board.sh"), "--port", str(port)],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=1500,1100",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.skipif(not CHROMIUM or not shutil.which("chromedriver"), reason="needs chromium and chromedriver")
def test_tensorboard_shows_curves_first_batch_graph_and_hparams(board, browser):
    from selenium.common.exceptions import WebDriverException

    def page(address, *expected):
        """Opens a page and waits until it holds all of these texts."""
        deadline, missing = time.monotonic() + 60, list(expected)
        while True:
            try:
                browser.get(address)
                break
            except WebDriverException:  # it is still starting
                assert time.monotonic() < deadline, f"no answer from {address}"
                time.sleep(0.5)
        while missing:
            assert time.monotonic() < deadline, f"not on {address}: {missing}"
            text = browser.execute_script(TEXT_WITH_SHADOWS)
            missing = [word for word in expected if word not in text]
            time.sleep(0.5)
        if target := os.environ.get("KEEP_SCREENSHOTS"):  # to look at
            time.sleep(4)
            browser.save_screenshot(
                str(Path(target, address.split("?")[1].replace("/", "").replace("#", "-") + ".png"))
            )

    page(
        f"{board}/?tagFilter=train#timeseries", "photos/version_0", "train/accuracy", "train/loss", "train/first_batch"
    )
    page(f"{board}/?tagFilter=val/#timeseries", "val/accuracy", "val/auroc", "val/f1", "val/loss", "val/recall")
    page(f"{board}/?hparams#hparams", "val_best/loss", "model/name", "flip")
    page(f"{board}/?graphs#graphs", "Main Graph", "Sequential", "photos/version_0")
    assert "latest" not in browser.execute_script(TEXT_WITH_SHADOWS)


TEXT_WITH_SHADOWS = """
function text(node) {
    let found = node.nodeType === Node.TEXT_NODE ? node.textContent.trim() : "";
    for (const child of [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes]) found += text(child);
    return found;
}
return text(document.body);
"""
