"""Shards: the same images and figures as a folder's, in a folder and in object storage."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import psutil
import pytest
from lightning.pytorch import Callback
from litdata.streaming import StreamingDataset
from moto.server import ThreadedMotoServer
from PIL import Image

from project import cli
from project.classifier import Classifier
from project.commands import shard as shard_command
from project.data import images, manifest, shards
from project.data.datamodule import ImageData
from project.data.splits import SPLITS
from project.errors import FailedRun
from project.evaluation import run_split
from tests.conftest import SMALL, make_images, read_csv

OUT = Path("out")
EPOCHS = ["--trainer.max_epochs", "2"]


def fit(root, *words):
    return cli.main(["fit", "--data.root", str(root), *SMALL, *EPOCHS, *words])


def measured(run):
    """The test figures of a run."""
    return {key: value for key, value in json.loads((run / "test_metrics.json").read_text()).items() if "/" in key}


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(shard_command, "MOST_IMAGES", 20)


@pytest.fixture
def out(photos, small_files):
    """out/: the photos as they are, in six files."""
    assert cli.main(["shard", "photos", "out", "--keep"]) == 0
    return OUT


def test_images_labels_and_split_are_those_of_the_folder_and_litdata_reads_them_too(out, capsys):
    expected, found = manifest.load(Path("photos")), manifest.load(out)
    assert list(found.paths) == list(expected.paths)
    assert (found.labels.tolist(), found.splits.tolist()) == (expected.labels.tolist(), expected.splits.tolist())
    assert (found.class_names, found.is_stored) == (expected.class_names, True)
    for path in expected.paths:
        assert shards.read(f"out/{path}") == Path("photos", path).read_bytes()
    samples = StreamingDataset(str(out.absolute()))
    assert len(samples) == len(expected.paths)
    for row in (0, 19, 20, 119):
        sample = samples[row]
        assert sample["image"] == Path("photos", expected.paths[row]).read_bytes()
        assert (sample["path"], sample["class"]) == (expected.paths[row], sample["path"].split("/")[0])
        assert (sample["label"], sample["split"]) == (expected.labels[row], SPLITS[expected.splits[row]])
    assert cli.main(["shard", "photos", "out", "--keep"]) == 2
    assert "out exists; give another folder, or remove it." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 4), (2, 2), (3, 1)])
def test_every_image_is_read_once_an_epoch(out, ranks, workers):
    data = ImageData(str(out), image_size=32, batch_size=8, workers=workers, cache="off")
    seen = []
    for rank in range(ranks):
        loader = data.in_order("val")
        loader.batch_sampler.rank, loader.batch_sampler.world_size = rank, ranks
        for batch in loader:
            seen += batch.row.tolist()
            for row, pixels in zip(batch.row.tolist(), batch.image, strict=True):
                path = Path("photos", os.path.relpath(data.dataset("val").path(row), out))
                assert np.array_equal(pixels.permute(1, 2, 0), images.read(path, 32))
        if workers:
            loader._iterator._shutdown_workers()  # as Lightning does after a fit
    assert sorted(seen) == list(range(len(data.dataset("val"))))


def stop_in_the_seventh_step(_, outputs, batch, batch_idx):
    if batch_idx == 6:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_fit_has_the_figures_of_a_fit_on_the_folder_and_all_verbs_take_shards(out, monkeypatch):
    assert fit("photos") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_batch_end", stop_in_the_seventh_step)
        assert fit("out") == 130
    assert cli.main(["fit", "--resume", "runs/out/version_0"]) == 0
    for root in ("photos", "out"):
        assert cli.main(["test", f"runs/{root}/version_0"]) == 0
    runs = [Path("runs", name, "version_0") for name in ("photos", "out")]
    of_folder, of_shards = ((run / "metrics.csv").read_text() for run in runs)
    assert of_shards == of_folder
    assert measured(runs[0]) == measured(runs[1])
    rows = [[row | {"path": row["path"].split("/", 1)[1]} for row in read_csv(run / "predictions.csv")] for run in runs]
    assert rows[0] == rows[1]
    report = (runs[1] / "report.html").read_text()
    assert report.count("<img") == (runs[0] / "report.html").read_text().count("<img") > 0
    assert not (runs[1] / "split.csv").exists()
    run = str(runs[1])
    assert cli.main(["predict", run, "out", "--out", "all.csv"]) == 0
    assert [row["true"] for row in read_csv("all.csv")] == [row.label for row in manifest.rows_of_shards(out)]
    assert cli.main(["predict", run, f"out/{manifest.load(out).paths[0]}", "--out", "one.csv"]) == 0
    assert cli.main(["explain", run, f"out/{manifest.load(out).paths[0]}", "--out", "maps"]) == 0
    assert cli.main(["check", "out"]) == cli.main(["check", "photos"])
    assert cli.main(["export", run, "--out", "bundle"]) == 0


def test_large_images_are_shrunk_and_small_ones_kept(workplace, capsys):
    make_images(Path("large"), {"a": 4, "b": 4})
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 600, 4), dtype=np.uint8))
    wide.save("large/a/wide.png")
    Path("large/b/broken.png").write_bytes(b"no image")
    assert cli.main(["shard", "large", "out", "--short_side", "100"]) == 0
    said = capsys.readouterr().out
    assert "left out, unreadable: b/broken.png (" in said
    assert "written: out, 9 images in 1 file, " in said
    with images.opened("out/a/wide.png") as image:
        assert (image.size, image.format) == ((200, 100), "JPEG")
    assert shards.read("out/b/000.png") == Path("large/b/000.png").read_bytes()
    with pytest.raises(images.ImageError, match="no such file"):
        images.read("out/b/broken.png", 32)
    cli.main(["check", "out"])
    assert "extension" not in capsys.readouterr().out  # that of wide.png is no mistake


def test_groups_splits_and_exclusions_are_stored_or_applied(photos, capsys):
    split = [("path", "label", "split")]
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        split.append((path.relative_to(photos).as_posix(), path.parent.name, ("train", "val", "test")[number % 3]))
    Path("split.csv").write_text("\n".join(",".join(row) for row in split))
    assert cli.main(["shard", "photos", "out", "--split", "split.csv"]) == 0
    stored = {row.path: row.split for row in manifest.rows_of_shards(OUT)}
    assert stored == {path: side for path, _, side in split[1:]}
    Path("out.csv").write_text(f"path\n{split[1][0]}\n")
    assert len(manifest.load(OUT, exclude=Path("out.csv")).paths) == 119
    assert cli.main(["shard", "photos", "grouped", "--group", r"(\d)\.png", "--exclude", "out.csv"]) == 0
    assert "left out, listed in out.csv: 1 of 1 paths" in capsys.readouterr().out
    assert {row.group for row in manifest.rows_of_shards(Path("grouped"))} == set("0123456789")


def test_shards_that_are_not_whole_or_begun_otherwise_are_refused_in_a_sentence(out, capsys):
    shutil.copytree(out, "copy")
    Path("copy/chunk-2-0.bin").unlink()
    assert fit("copy") == 2
    assert "The shards in copy are not whole: chunk-2-0.bin; copy them again" in capsys.readouterr().err
    shutil.copy("out/chunk-1-0.bin", "copy/chunk-2-0.bin")
    with (out / "chunk-3-0.bin").open("ab") as stream:
        stream.write(b"x")
    assert fit("out") == 2
    assert "not whole: chunk-3-0.bin" in capsys.readouterr().err
    for content in ("{", "[]"):
        Path("copy/shards.json").write_text(content)
        assert fit("copy") == 2
        assert "not whole: shards.json" in capsys.readouterr().err
    rows = np.load("copy/rows.npy")
    for damaged in (rows.view(np.uint8), rows[["path", "label"]], np.rec.array(rows.copy())):
        damaged[-1:] = damaged[:1]
        if damaged.dtype == rows.dtype:
            damaged["label"][0] = -1
        np.save("copy/rows.npy", damaged)
        about = json.loads((out / "shards.json").read_text()) | {"rows": Path("copy/rows.npy").stat().st_size}
        Path("copy/shards.json").write_text(json.dumps(about))
        shutil.copy(out / "chunk-2-0.bin", "copy")
        assert fit("copy") == 2
        assert "copy/rows.npy is damaged; copy it again" in capsys.readouterr().err
    Path("copy/shards.json").write_text(json.dumps({"rows": about["rows"], "chunks": about["chunks"]}))
    assert fit("copy") == 2
    assert "not whole: shards.json" in capsys.readouterr().err
    Path("begun").mkdir()
    Path("begun/unfinished.json").write_text('{"short_side": 64, "images": ""}')
    assert cli.main(["shard", "photos", "begun"]) == 2
    assert "begun was begun with other options or images; remove it" in capsys.readouterr().err


def test_a_file_that_another_process_has_just_renamed_does_no_harm(out):
    (out / ".chunk-0-0.bin.tmp").symlink_to("renamed")  # listed, but without a status
    assert len(manifest.load(out).paths) == 120


def test_tables_may_have_groups_of_any_letters_but_no_images_outside_their_folder(photos, capsys):
    files = sorted(photos.rglob("*.png"))
    lines = [f"{file.relative_to(photos)},{file.parent.name},ü{number}" for number, file in enumerate(files)]
    Path("photos/groups.csv").write_text("\n".join(["path,label,group", *lines]))
    assert cli.main(["shard", "photos/groups.csv", "grouped"]) == 0
    assert next(manifest.rows_of_shards(Path("grouped"))).group == "ü0"
    for name, above in (("absolute.csv", Path.cwd()), ("photos/above.csv", "..")):
        Path(name).write_text("\n".join(["path,label", *(f"{above}/{file},{file.parent.name}" for file in files)]))
        assert cli.main(["shard", name, "other"]) == 2
        assert f"{name} must have relative paths, below its folder" in capsys.readouterr().err
    assert cli.main(["shard", "photos", "s3://bucket/photos"]) == 2
    assert "shard writes a folder, not s3://bucket/photos" in capsys.readouterr().err


def test_a_command_does_not_go_on_with_files_of_other_sizes(photos, monkeypatch, capsys):
    first, *_ = files = sorted(photos.rglob("*.png"))
    monkeypatch.setattr(shard_command, "MOST_BYTES", 4 * max(file.stat().st_size for file in files))
    with monkeypatch.context() as patch:
        patch.setattr(shard_command, "_finish", lambda *_: signal.raise_signal(signal.SIGINT))
        assert cli.main(["shard", "photos", "out", "--keep"]) == 130
    with first.open("ab") as stream:
        stream.write(bytes(shard_command.MOST_BYTES))  # the next images would lie in other files
    assert cli.main(["shard", "photos", "out", "--keep"]) == 2
    assert "out was begun with other options or images" in capsys.readouterr().err


def test_a_run_on_shards_has_their_split_on_the_folder_too(photos):
    assert cli.main(["shard", "photos", "out", "--split_seed", "3"]) == 0
    Path("config.yaml").write_text("data: {root: out}")
    stored = manifest.load(OUT)
    metadata = SimpleNamespace(config={"data": {"root": "out"}}, class_names=stored.class_names)
    for root in ("out", "photos"):
        found = run_split.images(Path(), "test", metadata, root)
        assert [path for path, _ in found.pairs] == [f"{root}/{stored.paths[row]}" for row in stored.rows("test")]
        assert found.notice == ""


@pytest.mark.slow
def test_a_killed_command_goes_on_and_writes_the_same(photos):
    code = "import sys; from project import cli; from project.commands import shard; "
    code += "shard.MOST_IMAGES = 4; sys.exit(cli.main())"
    command = [sys.executable, "-c", code, "shard", "photos"]
    whole, killed = (psutil.Popen([*command, name, "--short_side", "16"]) for name in ("whole", "killed"))
    deadline = time.monotonic() + 120
    while not Path("killed/part-3.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not shards.is_shards("killed")
    first = Path("killed/chunk-0-0.bin").stat().st_mtime_ns
    assert psutil.Popen([*command, "killed", "--short_side", "16"]).wait(120) == whole.wait(120) == 0
    assert Path("killed/chunk-0-0.bin").stat().st_mtime_ns == first
    assert {file.name: file.read_bytes() for file in Path("killed").iterdir()} == {
        file.name: file.read_bytes() for file in Path("whole").iterdir()
    }


@pytest.fixture
def storage(out, monkeypatch):
    """A real S3 server with the shards in bucket/photos, and its address in the usual variables."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    shards._client.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    upload(client, out)
    yield server
    server.stop()
    shards._client.cache_clear()


def upload(client, folder):
    for file in folder.iterdir():
        client.upload_file(str(file), "bucket", f"photos/{file.name}")


@pytest.mark.slow
def test_object_storage_has_the_figures_of_the_folder_and_is_read_once(storage, out):
    assert fit("out") == fit("s3://bucket/photos", "--data.workers", "0") == 0
    assert cli.main(["test", "runs/out/version_0"]) == cli.main(["test", "runs/photos/version_0"]) == 0
    runs = [Path("runs", name, "version_0") for name in ("out", "photos")]
    assert (runs[0] / "metrics.csv").read_text() == (runs[1] / "metrics.csv").read_text()
    assert measured(runs[0]) == measured(runs[1])
    cached = {file: file.stat().st_mtime_ns for file in shards.place("s3://bucket/photos").glob("chunk-*")}
    assert len(cached) == 6
    assert fit("s3://bucket/photos", "--trainer.max_steps", "1") == 0
    assert cached == {file: file.stat().st_mtime_ns for file in cached}


def test_other_shards_at_the_same_place_replace_the_cached_ones(storage, out):
    data = manifest.load(shards.local("s3://bucket/photos"))
    path = data.paths[0]
    before = images.read(data.root / path, 32)
    Image.fromarray(255 - before).save(Path("photos", path), compress_level=0)
    assert cli.main(["shard", "photos", "same", "--keep"]) == 0
    upload(boto3.client("s3"), Path("same"))
    assert np.array_equal(images.read(shards.local("s3://bucket/photos") / path, 32), 255 - before)
    Image.fromarray(before).save(Path("photos", path), compress_level=0)  # as many bytes
    assert cli.main(["shard", "photos", "other", "--keep"]) == 0
    assert (Path("other/rows.npy").read_bytes()) == (Path("same/rows.npy").read_bytes())
    upload(boto3.client("s3"), Path("other"))
    assert np.array_equal(images.read(shards.local("s3://bucket/photos") / path, 32), before)


def test_old_and_new_shards_are_never_mixed(storage, out, capsys):
    url, client = "s3://bucket/photos", boto3.client("s3")
    root = shards.local(url)
    path = str(root / manifest.load(root).paths[0])
    Path("left_out.csv").write_text(f"path\n{manifest.load(out).paths[0]}\n")
    assert cli.main(["shard", "photos", "new", "--keep", "--exclude", "left_out.csv"]) == 0
    upload(client, Path("new"))
    with pytest.raises(FailedRun, match="Other shards have replaced those of"):
        shards.read(path)
    upload(client, out)
    client.upload_file("new/shards.json", "bucket", "photos/shards.json")  # the others follow later
    assert fit(url) == 2
    assert "not whole: rows.npy" in capsys.readouterr().err
    upload(client, Path("new"))
    assert len(manifest.load(shards.local(url)).paths) == 119


def test_storage_that_is_not_there_is_a_sentence(storage, monkeypatch, capsys):
    assert fit("s3://bucket/nothing") == 2
    assert "Cannot read s3://bucket/nothing/shards.json: " in capsys.readouterr().err
    assert fit("s3://nobody/photos") == 2
    assert "Cannot read s3://nobody/photos/shards.json: " in capsys.readouterr().err
    root = shards.local("s3://bucket/photos")
    path = manifest.load(root).paths[0]
    assert fit(f"s3://bucket/photos/{path}") == 2
    assert images.read(root / path, 32).shape == (32, 32, 3)  # no folder of that name is in its way
    monkeypatch.setattr(shards, "ATTEMPTS", 2)
    shards._client.cache_clear()
    storage.stop()
    assert fit("s3://bucket/photos") == 2
    assert "Could not connect to the endpoint" in capsys.readouterr().err


def test_a_network_that_comes_back_is_waited_for(storage):
    root = shards.local("s3://bucket/photos")
    storage.stop()
    again = ThreadedMotoServer(*storage.get_host_and_port())
    timer = threading.Timer(2, again.start)
    timer.start()
    path = manifest.load(root).paths[0]
    try:
        assert shards.read(str(root / path)) == Path("photos", path).read_bytes()
        assert not timer.is_alive()
    finally:
        again.stop()


class Cut(Callback):
    """Ends the storage, and loses what was read, after the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        STORAGE[0].stop()
        for file in shards.CACHE.rglob("chunk-*"):
            file.unlink()


STORAGE = []


def test_a_network_that_stays_away_ends_the_fit_in_a_sentence_and_keeps_the_checkpoint(storage, monkeypatch, capsys):
    monkeypatch.setattr(shards, "ATTEMPTS", 2)
    monkeypatch.setattr(sys.modules[__name__], "STORAGE", [storage])
    words = ["s3://bucket/photos", "--data.cache", "off", "--trainer.max_epochs", "3", "--save_every", "0.001"]
    assert fit(*words, "--trainer.callbacks+=tests.data.test_shards.Cut") == 1
    said = capsys.readouterr().err
    assert "failed: Cannot read s3://bucket/photos/chunk-" in said
    assert "Resume with: python -m project.cli fit --resume runs/photos/version_0" in said
    assert Path("runs/photos/version_0/checkpoints/last.ckpt").exists()
    assert json.loads(Path("runs/photos/version_0/status.json").read_text())["state"] == "failed"


def test_shards_that_were_written_anew_are_not_taken_for_those_of_a_run(out, capsys):
    assert fit("out", "--trainer.max_steps", "3") == 0
    shutil.rmtree(out)
    assert cli.main(["shard", "photos", "out", "--keep", "--split_seed", "1"]) == 0
    for words in (
        ["test", "runs/out/version_0"],
        ["fit", "--resume", "runs/out/version_0", "--trainer.max_steps", "-1"],
    ):
        assert cli.main(words) == 2
        assert "The shards in out are not those of runs/out/version_0 any more" in capsys.readouterr().err
    assert cli.main(["test", "runs/out/version_0", "--data.root", "photos", "--report", "false"]) == 0
