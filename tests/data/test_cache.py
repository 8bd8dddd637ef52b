"""cache.py: a cached image is right, or it is not used."""

import itertools
import multiprocessing
import os
import pickle
import random
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from project.data import cache, images
from project.data.cache import Cache, choose, stamp
from project.data.dataset import ImageDataset

SIZE = 30  # 2,700 bytes an image: not a multiple of the checksum's eight
FORK = multiprocessing.get_context("fork")


def dataset(root, file="it.pixels"):
    paths = sorted(str(path.relative_to(root)) for path in root.glob("*/*.*"))
    return ImageDataset(root, paths, None, SIZE, cache=Cache(Path(file), len(paths), SIZE))


def all_of(data, epoch=0):
    """All images of a set (N, H, W, 3)."""
    return data.__getitems__([(epoch, row) for row in range(len(data))]).image.permute(0, 2, 3, 1).numpy()


def truth(data):
    return np.stack([images.read(data.path(row), data.image_size) for row in range(len(data))])


def test_second_reading_is_the_same_and_decodes_nothing(photos, monkeypatch):
    data = dataset(photos)
    first = all_of(data)
    assert (first == truth(data)).all()
    packed = pickle.dumps(data)  # for a worker
    assert len(packed) < 10_000  # no pixels
    monkeypatch.setattr(images, "read", None)
    assert (all_of(pickle.loads(packed)) == first).all()


def test_image_replaced_by_one_of_the_same_size_and_date_is_read_again(workplace):
    file = Path("blue", "003.bmp")
    file.parent.mkdir()
    for value in (10, 200):
        Image.fromarray(np.full((30, 40, 3), value, dtype=np.uint8)).save(file)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert (all_of(dataset(workplace)) == value).all()


def test_deleted_and_damaged_images_are_named_and_left_out_although_they_are_cached(photos):
    data = dataset(photos)
    data.labels = np.arange(len(data))
    right = all_of(data)
    (photos / "blue" / "000.png").unlink()
    (photos / "blue" / "002.png").write_bytes(b"no image")
    batch = data.__getitems__([(0, row) for row in range(4)])
    assert batch.failed == [(0, "no such file or directory"), (2, "not an image, or of an unknown format")]
    assert batch.row.tolist() == batch.label.tolist() == [1, 3]
    assert (batch.image.permute(0, 2, 3, 1).numpy() == right[[1, 3]]).all()


@pytest.mark.parametrize("torn", [1, 16, 1350, 16 + 2699])
def test_torn_row_is_not_used(photos, torn):
    data = dataset(photos)
    all_of(data)
    content = bytearray(Path("it.pixels").read_bytes())
    content[5 * (16 + SIZE * SIZE * 3) + torn] ^= 255
    Path("it.pixels").write_bytes(content)
    assert [data.cache.get(row, stamp(data.path(row))) is not None for row in (5, 6)] == [False, True]
    assert (all_of(data) == truth(data)).all()


def write_forever(data, right, ready):
    for number in itertools.count():
        row = number % len(data)
        data.cache.put(row, stamp(data.path(row)), right[row])
        if number == len(data):
            ready.set()


def test_writers_killed_at_any_moment_leave_no_wrong_image(photos):
    random.seed(0)
    data = dataset(photos)
    right = truth(data)
    for _ in range(6):
        ready = [FORK.Event(), FORK.Event()]
        writers = [FORK.Process(target=write_forever, args=(data, right, event)) for event in ready]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in ready)
        time.sleep(random.random() / 50)
        for writer in writers:
            writer.kill()
            writer.join()
        found = [data.cache.get(row, stamp(data.path(row))) for row in range(len(data))]
        assert all((pixels == right[row]).all() for row, pixels in enumerate(found) if pixels is not None)
        assert sum(pixels is not None for pixels in found) >= len(data) - 2  # all but what each was writing
    assert (all_of(data) == right).all()


def test_full_disk_is_reported_and_images_are_read_without_the_cache(photos, capfd):
    Path("full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", "full"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        data = dataset(photos, "full/it.pixels")
        with FORK.Pool(3) as pool:
            pool.map(all_of, [data] * 3)
        assert (all_of(data) == truth(data)).all()
        assert 0 < capfd.readouterr().out.count("No space left on device; continuing without") <= 4  # once a process
    finally:
        subprocess.run(["umount", "-l", "full"], check=True)


def test_cache_that_cannot_be_created_is_reported_and_images_are_read_without_it(photos, capsys):
    Path("place").write_text("a file where the folder should be")
    assert choose("on", Path("place"), photos, ["a.png"], SIZE, "stretch")[0] is not None  # reported by the first row
    data = dataset(photos, "place/it.pixels")
    assert (all_of(data) == truth(data)).all()
    assert capsys.readouterr().out.count("continuing without") == 1


def test_auto_decides_by_free_space_and_explains(photos, monkeypatch):
    folder, options = Path("data/cache"), (photos, ["red/000.png", "red/001.png"], SIZE, "stretch")
    chosen, sentence = choose("auto", folder, *options)
    assert str(chosen.file) in sentence
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    chosen, sentence = choose("auto", folder, *options)
    assert chosen is None
    assert "more than half" in sentence
    assert choose("off", folder, *options) == (None, "")
    before = choose("on", folder, *options)[0].file
    for source in cache.SOURCE:  # an edit there changes what a row holds
        Path(source.name).write_bytes(source.read_bytes() + b"#")
        with monkeypatch.context() as edited:
            edited.setattr(cache, "SOURCE", [Path(file.name) if file == source else file for file in cache.SOURCE])
            assert choose("on", folder, *options)[0].file != before
    names = {"__init__", "cache", "dataset", "images"}  # a module that a fork adds comes by itself
    assert {source.stem for source in cache.SOURCE} == names
    for index, other in enumerate((photos / "red", ["red/001.png"], SIZE + 1, "pad")):  # each has its own cache
        changed = [*options[:index], other, *options[index + 1 :]]
        assert choose("on", folder, *changed)[0].file != choose("on", folder, *options)[0].file
    ways = ("crop", "crop:bicubic", "crop:bicubic:0.875", "crop:bicubic:0.87")
    ours = {choose("on", folder, *options[:3], way)[0].file.name for way in ways}
    assert len(ours) == 4
    assert not any(":" in name for name in ours)  # which Windows does not allow
