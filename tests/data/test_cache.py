"""cache.py: a cached image is right, or it is not used."""

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
from tests.conftest import make_images

SIZE = 30  # 2,700 bytes an image: not a multiple of the checksum's eight
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def photos(workplace):
    return make_images(workplace / "photos", {"red": 12, "blue": 12})


def files(root):
    return sorted(root.rglob("*.png"))


def relative(root):
    return [str(file.relative_to(root)) for file in files(root)]


def dataset(root, file="it.pixels"):
    paths = relative(root)
    return ImageDataset(root, paths, None, SIZE, cache=Cache(Path(file), len(paths), SIZE))


def all_of(data):
    return data.__getitems__([(0, row) for row in range(len(data))]).image.permute(0, 2, 3, 1).numpy()


def truth(root):
    return np.stack([images.read(file, SIZE) for file in files(root)])


def test_second_reading_is_the_same_and_decodes_nothing(photos, monkeypatch):
    data = dataset(photos)
    first = all_of(data)
    assert (first == truth(photos)).all()
    packed = pickle.dumps(data)  # for a worker
    assert len(packed) < 4000
    monkeypatch.setattr(images, "read", None)
    assert (all_of(pickle.loads(packed)) == first).all()


def test_image_replaced_by_one_of_the_same_size_and_date_is_read_again(photos):
    file = photos / "blue" / "003.bmp"
    data = ImageDataset(photos, ["blue/003.bmp"], None, SIZE, cache=Cache(Path("it.pixels"), 1, SIZE))
    for value in (10, 200):
        Image.fromarray(np.full((30, 40, 3), value, dtype=np.uint8)).save(file)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert (all_of(data) == value).all()


def test_deleted_and_damaged_images_fail_although_they_are_cached(photos):
    data = dataset(photos)
    all_of(data)
    (photos / "blue" / "000.png").unlink()
    (photos / "blue" / "001.png").write_bytes(b"no image")
    failed = data.__getitems__([(0, row) for row in range(4)]).failed
    assert failed == [(0, "no such file or directory"), (1, "not an image, or of an unknown format")]


@pytest.mark.parametrize("torn", [1, 16, 1350, 16 + 2699])
def test_torn_row_is_not_used(photos, torn):
    cached = dataset(photos).cache
    all_of(dataset(photos))
    content = bytearray(Path("it.pixels").read_bytes())
    content[5 * (16 + SIZE * SIZE * 3) + torn] ^= 255
    Path("it.pixels").write_bytes(content)
    found = [cached.get(row, stamp(str(files(photos)[row]))) is not None for row in (5, 6)]
    assert found == [False, True]
    assert (all_of(dataset(photos)) == truth(photos)).all()


def write_forever(paths, right, ready):
    cached = Cache(Path("it.pixels"), len(paths), SIZE)
    for number in range(10**9):
        cached.put(number % len(paths), stamp(paths[number % len(paths)]), right[number % len(paths)])
        if number == len(paths):
            ready.set()


def test_writers_killed_at_any_moment_leave_no_wrong_image(photos):
    random.seed(0)
    right, paths = truth(photos), [str(file) for file in files(photos)]
    for _ in range(6):
        ready = [FORK.Event(), FORK.Event()]
        writers = [FORK.Process(target=write_forever, args=(paths, right, event)) for event in ready]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in ready)
        time.sleep(random.random() / 50)
        for writer in writers:
            writer.kill()
            writer.join()
        cached = Cache(Path("it.pixels"), len(paths), SIZE)
        found = [cached.get(row, stamp(path)) for row, path in enumerate(paths)]
        assert all((pixels == right[row]).all() for row, pixels in enumerate(found) if pixels is not None)
        assert sum(pixels is not None for pixels in found) >= len(paths) - 2  # all but what each was writing
    assert (all_of(dataset(photos)) == right).all()


def test_full_disk_is_reported_and_images_are_read_without_the_cache(photos, capfd):
    Path("full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", "full"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with FORK.Pool(3) as pool:
            pool.map(all_of, [dataset(photos, "full/it.pixels")] * 3)
        assert (all_of(dataset(photos, "full/it.pixels")) == truth(photos)).all()
        assert 0 < capfd.readouterr().out.count("No space left on device; continuing without") <= 4  # once a process
    finally:
        subprocess.run(["umount", "-l", "full"], check=True)


def test_cache_that_cannot_be_created_is_reported_and_images_are_read_without_it(photos, capsys):
    Path("place").write_text("a file where the folder should be")
    assert choose("on", Path("place"), photos, ["a.png"], SIZE, "stretch")[0] is not None  # reported by the first row
    assert (all_of(dataset(photos, "place/it.pixels")) == truth(photos)).all()
    assert capsys.readouterr().out.count("continuing without") == 1


def test_auto_decides_by_free_space_and_explains(photos, monkeypatch):
    folder, options = Path("data/cache"), (photos, relative(photos), SIZE, "stretch")
    chosen, sentence = choose("auto", folder, *options)
    assert str(chosen.file) in sentence
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    chosen, sentence = choose("auto", folder, *options)
    assert chosen is None
    assert "more than half" in sentence
    assert choose("off", folder, *options) == (None, "")
    for index, other in enumerate((photos / "red", relative(photos)[1:], SIZE + 1, "pad")):  # each has its own cache
        changed = [*options[:index], other, *options[index + 1 :]]
        assert choose("on", folder, *changed)[0].file != choose("on", folder, *options)[0].file
