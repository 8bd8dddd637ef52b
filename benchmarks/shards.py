"""What shards cost and save: images a second, beside a folder's, and a start with a million images."""

import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from moto.server import ThreadedMotoServer

from project import cli
from project.commands.bench import make_photographs
from project.data import shards as format_
from project.data.datamodule import ImageData

MILLION = 1_000_000
FIT = ["--data.image_size", "32", "--data.batch_size", "8", "--data.workers", "0"]
FIT += ["--model.name", "squeezenet1_1", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]


def shards(count: int = 600, rounds: int = 5, workers: int = 2) -> dict[str, Any]:
    """Compares reading from a folder of photographs, from shards, and from shards on a local S3 server, once cached.

    Args:
        count: Number of photographs.
        rounds: Epochs of each, in turn, after one that warms up, and fits of each length; the median counts.
        workers: Processes that read.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for label in ("a", "b"):
            make_photographs(Path("photos", label), count // 2)
        assert cli.main(["shard", "photos", "kept", "--keep"]) == cli.main(["shard", "photos", "shrunk"]) == 0
        roots = {"folder": "photos", "shards, --keep": "kept", "shards, 256 px": "shrunk"}
        with _server(Path("kept")) as url:
            speeds = _speeds(roots | {"S3, --keep, cached": url}, rounds, workers)
        starts = _starts(Path("shrunk"), rounds)
    for root, speed in speeds.items():
        print(f"{root:20} {speed:8,.0f} images/s   {speed / speeds['folder']:5.2f} of the folder's")
    more = starts[MILLION] - starts[1_000]
    print(f"fit of two steps: {starts[1_000]:.2f} s with 1,000 images, {more:+.2f} s with {MILLION:,}")
    return {"images_per_second": speeds, "start_seconds": starts}


@contextlib.contextmanager
def _server(folder: Path) -> Any:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for file in folder.iterdir():
        client.upload_file(str(file), "bucket", f"photos/{file.name}")
    yield "s3://bucket/photos"
    server.stop()


def _speeds(roots: dict[str, str], rounds: int, workers: int) -> dict[str, float]:
    loaders = {}
    for name, root in roots.items():
        data = ImageData(root, cache="off", workers=workers)
        data.setup("fit")
        loaders[name] = data.train_dataloader()
    speeds: dict[str, list[float]] = {name: [] for name in roots}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            begun = time.perf_counter()
            read = sum(len(batch.row) for batch in loader)
            speeds[name].append(read / (time.perf_counter() - begun))
    return {name: statistics.median(values[1:]) for name, values in speeds.items()}


def _starts(folder: Path, rounds: int) -> dict[int, float]:
    """Seconds of a short fit by the number of images; the same few files, under as many names."""
    _, old = format_.opened(folder)
    for count in (1_000, MILLION):
        rows, copy = np.zeros(count, format_.dtype(40, 1)), Path(f"many-{count}")
        shutil.copytree(folder, copy)
        for column in ("label", "split", "chunk", "offset", "size"):
            rows[column] = np.sort(old, order="split")[column][np.arange(count) % len(old)]
        rows["path"] = [b"%09d.jpg" % number for number in range(count)]
        with (copy / format_.ROWS).open("wb") as stream:
            np.save(stream, rows)
        about = json.loads((copy / format_.ABOUT).read_text()) | {"rows": (copy / format_.ROWS).stat().st_size}
        (copy / format_.ABOUT).write_text(json.dumps(about))
    times: dict[int, list[float]] = {1_000: [], MILLION: []}
    for _ in range(rounds + 1):
        for count, seconds in times.items():
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(["fit", f"many-{count}", *FIT]) == 0
            seconds.append(time.perf_counter() - begun)
    return {count: statistics.median(seconds[1:]) for count, seconds in times.items()}
