"""cache.py: a cached image is right, or it is not used."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from project.data import cache, images
from project.data.cache import Cache, choose, stamp
from project.data.dataset import ImageDataset
from project.data.strings import StringArray
from tests.conftest import make_images

SIZE = 30  # 2,700 bytes an image: not a multiple of the checksum's eight


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


def in_processes(*targets, file="it.pixels"):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=all_of, args=(dataset(root, file),)) for root in targets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def test_second_reading_is_the_same_and_decodes_nothing(photos, monkeypatch):
    first = all_of(dataset(photos))
    with monkeypatch.context() as patched:
        patched.setattr(images, "read", None)
        again = all_of(dataset(photos))
    assert (first == again).all()
    assert (again == truth(photos)).all()


def test_changed_image_is_read_again(photos):
    data = dataset(photos)
    all_of(data)
    shutil.copy(photos / "red" / "003.png", photos / "blue" / "007.png")
    assert (all_of(data) == truth(photos)).all()
    assert (all_of(dataset(photos)) == truth(photos)).all()


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


FILL = """
import sys
from pathlib import Path
from project.data import images
from project.data.cache import Cache, stamp
paths = sorted(map(str, Path("photos").rglob("*.png")))
cached = Cache(Path("it.pixels"), len(paths), 30)
pixels = [images.read(path, 30) for path in paths]
print("ready", flush=True)
while True:
    for row, path in enumerate(paths):
        cached.put(row, stamp(path), pixels[row])
"""


def test_writers_killed_at_any_moment_leave_no_wrong_image(photos):
    random.seed(0)
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    right, paths = truth(photos), [str(file) for file in files(photos)]
    for _ in range(6):
        command = [sys.executable, "-c", FILL]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=here) for _ in range(2)]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(random.random() / 50)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        cached = Cache(Path("it.pixels"), len(paths), SIZE)
        found = [cached.get(row, stamp(path)) for row, path in enumerate(paths)]
        assert all((pixels == right[row]).all() for row, pixels in enumerate(found) if pixels is not None)
        assert sum(pixels is not None for pixels in found) >= len(paths) - 2  # all but what each was writing
    assert (all_of(dataset(photos)) == right).all()


def test_many_processes_fill_one_cache(photos):
    in_processes(*[photos] * 4)
    assert (all_of(dataset(photos)) == truth(photos)).all()


def test_full_disk_is_reported_once_and_images_are_read_without_the_cache(photos, capfd):
    Path("full").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", "full"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        in_processes(*[photos] * 3, file="full/it.pixels")
        assert (all_of(dataset(photos, "full/it.pixels")) == truth(photos)).all()
        assert capfd.readouterr().out.count("No space left on device; continuing without") == 1
    finally:
        subprocess.run(["umount", "-l", "full"], check=True)


def test_cache_that_cannot_be_created_is_reported_and_images_are_read_without_it(photos, capsys):
    Path("place").write_text("a file where the folder should be")
    paths = StringArray.of(["blue/000.png"])
    assert choose("on", Path("place"), photos, paths, SIZE, "stretch")[0] is not None  # reported when a row is written
    assert (all_of(dataset(photos, "place/it.pixels")) == truth(photos)).all()
    assert capsys.readouterr().out.count("continuing without") == 1


def test_pickle_holds_no_pixels_and_opens_the_same_file(photos):
    data = dataset(photos)
    all_of(data)
    packed = pickle.dumps(data)
    assert len(packed) < 4000
    assert pickle.loads(packed).cache.get(0, stamp(data.path(0))) is not None


def test_auto_decides_by_free_space_and_explains(photos, monkeypatch):
    options = (Path("data/cache"), photos, StringArray.of(relative(photos)), SIZE, "stretch")
    chosen, sentence = choose("auto", *options)
    assert chosen is not None
    assert "data/cache/" in sentence
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    chosen, sentence = choose("auto", *options)
    assert chosen is None
    assert "more than half" in sentence
    assert choose("on", *options)[0] is not None
    assert choose("off", *options) == (None, "")


def test_other_rows_sizes_and_modes_have_caches_of_their_own(photos):
    paths, folder = relative(photos), Path("data/cache")
    caches = [
        choose("on", folder, root, StringArray.of(rows), size, resize)[0].file
        for root, rows, size, resize in (
            (photos, paths, 30, "stretch"),
            (photos, paths, 31, "stretch"),
            (photos, paths, 30, "pad"),
            (photos, paths[1:], 30, "stretch"),
            (photos / "red", paths, 30, "stretch"),
        )
    ]
    assert len(set(caches)) == 5
