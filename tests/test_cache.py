"""cache.py: a kept picture is the picture, or it is not there."""

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

import numpy as np
import pytest
from PIL import Image

from project.data import cache, images
from project.data.cache import Cache, choose, stamp
from project.data.dataset import ImageDataset
from project.data.rows import Texts
from tests.conftest import make_pictures

SIZE = 30  # 2,700 bytes a picture: not a multiple of the checksum's eight


@pytest.fixture
def pictures(workplace):
    return make_pictures(workplace / "photos", {"red": 12, "blue": 12})


def dataset(root, file="it.pixels", size=SIZE):
    paths = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    return ImageDataset(root, paths, None, size, kept=Cache(Path(file), len(paths), size))


def all_of(data):
    return data.__getitems__([(0, row) for row in range(len(data))]).image.permute(0, 2, 3, 1).numpy()


def truth(root):
    return np.stack([images.read(p, SIZE) for p in sorted(root.rglob("*.png"))])


def test_second_reading_is_the_same_and_decodes_nothing(pictures, monkeypatch):
    first = all_of(dataset(pictures))
    monkeypatch.setattr(images, "read", None)
    again = all_of(dataset(pictures))
    assert (first == again).all()
    monkeypatch.undo()
    assert (again == truth(pictures)).all()


def test_changed_picture_is_read_again(pictures):
    data = dataset(pictures)
    all_of(data)
    shutil.copy(pictures / "red" / "003.png", pictures / "blue" / "007.png")
    assert (all_of(data) == truth(pictures)).all()
    assert (all_of(dataset(pictures)) == truth(pictures)).all()


def test_picture_replaced_by_one_of_the_same_size_and_date_is_read_again(pictures):
    before, after = (np.full((30, 40, 3), value, dtype=np.uint8) for value in (10, 200))
    file = pictures / "blue" / "003.bmp"
    Image.fromarray(before).save(file)
    os.utime(file, (1_700_000_000, 1_700_000_000))
    data = ImageDataset(pictures, ["blue/003.bmp"], None, SIZE, kept=Cache(Path("it.pixels"), 1, SIZE))
    assert (all_of(data) == 10).all()
    Image.fromarray(after).save(file)
    os.utime(file, (1_700_000_000, 1_700_000_000))
    assert (all_of(data) == 200).all()


def test_deleted_and_spoilt_pictures_fail_although_they_were_kept(pictures):
    data = dataset(pictures)
    all_of(data)
    (pictures / "blue" / "000.png").unlink()
    (pictures / "blue" / "001.png").write_bytes(b"no picture")
    failed = data.__getitems__([(0, row) for row in range(4)]).failed
    assert failed == [(0, "no such file or directory"), (1, "not a picture, or of an unknown format")]


@pytest.mark.parametrize("torn", [1, 16, 1350, 16 + 2699])
def test_torn_row_is_not_there(pictures, torn):
    kept = dataset(pictures).kept
    all_of(dataset(pictures))
    content = bytearray(Path("it.pixels").read_bytes())
    content[5 * (16 + SIZE * SIZE * 3) + torn] ^= 255
    Path("it.pixels").write_bytes(content)
    path = sorted(pictures.rglob("*.png"))[5]
    assert kept.get(5, stamp(str(path))) is None
    assert kept.get(6, stamp(str(sorted(pictures.rglob("*.png"))[6]))) is not None
    assert (all_of(dataset(pictures)) == truth(pictures)).all()


FILL = """
import sys
from pathlib import Path
from project.data import images
from project.data.cache import Cache, stamp
paths = sorted(map(str, Path("photos").rglob("*.png")))
kept = Cache(Path("it.pixels"), len(paths), 30)
pixels = [images.read(path, 30) for path in paths]
print("ready", flush=True)
while True:
    for row, path in enumerate(paths):
        kept.put(row, stamp(path), pixels[row])
"""


def test_writers_killed_at_any_moment_leave_no_wrong_picture(pictures):
    random.seed(0)
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    right, paths = truth(pictures), sorted(map(str, pictures.rglob("*.png")))
    for _ in range(6):
        command = [sys.executable, "-c", FILL]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE, env=here) for _ in range(2)]
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(random.random() / 50)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        kept = Cache(Path("it.pixels"), len(paths), SIZE)
        found = [kept.get(row, stamp(path)) for row, path in enumerate(paths)]
        assert all((pixels == right[row]).all() for row, pixels in enumerate(found) if pixels is not None)
        assert sum(pixels is not None for pixels in found) >= len(paths) - 2  # at most what each had in hand
    assert (all_of(dataset(pictures)) == right).all()


def test_many_processes_fill_one_cache_rightly(pictures):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=all_of, args=(dataset(pictures),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert (all_of(dataset(pictures)) == truth(pictures)).all()


def test_full_disk_is_said_once_and_training_goes_on_without(pictures, capfd):
    full = Path("full")
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(full)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=all_of, args=(dataset(pictures, "full/it.pixels"),)) for _ in range(3)]
        for worker in workers:
            worker.start()
            worker.join(60)
            assert worker.exitcode == 0
        assert (all_of(dataset(pictures, "full/it.pixels")) == truth(pictures)).all()
        assert capfd.readouterr().out.count("No space left on device; going on without") == 1
    finally:
        subprocess.run(["umount", "-l", str(full)], check=True)


def test_cache_that_cannot_be_made_is_said_and_training_goes_on(pictures, capsys):
    Path("place").write_text("a file where the folder should be")
    paths = Texts.of(["blue/000.png"])
    assert choose("on", Path("place"), pictures, paths, SIZE, "stretch")[0] is not None  # said when a row is written
    assert (all_of(dataset(pictures, "place/it.pixels")) == truth(pictures)).all()
    assert capsys.readouterr().out.count("going on without") == 1


def test_pickle_holds_no_pixels_and_opens_the_same_file(pictures):
    data = dataset(pictures)
    all_of(data)
    packed = pickle.dumps(data)
    assert len(packed) < 4000
    assert pickle.loads(packed).kept.get(0, stamp(data.path(0))) is not None


def test_auto_decides_by_room_and_says_so(pictures, monkeypatch):
    paths = Texts.of(sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png")))
    ask = (Path("data/cache"), pictures, paths, SIZE, "stretch")
    chosen, said = choose("auto", *ask)
    assert chosen is not None
    assert "data/cache/" in said
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    none, said = choose("auto", *ask)
    assert none is None
    assert "more than half" in said
    assert choose("on", *ask)[0] is not None
    assert choose("off", *ask) == (None, "")


def test_other_rows_sizes_and_modes_have_caches_of_their_own(pictures):
    paths = sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png"))
    folder = Path("data/cache")
    files = {
        choose("on", folder, pictures, Texts.of(paths), 30, "stretch")[0].file,
        choose("on", folder, pictures, Texts.of(paths), 31, "stretch")[0].file,
        choose("on", folder, pictures, Texts.of(paths), 30, "pad")[0].file,
        choose("on", folder, pictures, Texts.of(paths[1:]), 30, "stretch")[0].file,
        choose("on", folder, pictures / "red", Texts.of(paths), 30, "stretch")[0].file,
    }
    assert len(files) == 5
