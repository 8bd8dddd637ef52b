"""dataset.py, transforms.py, digits.py, loader.py and datamodule.py."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from project.data import digits, images, manifest, transforms, workers
from project.data.datamodule import ImageData
from project.data.dataset import read_size
from project.data.loader import BatchSampler
from project.errors import UserError
from tests.conftest import make_images
from tests.data.test_cache import all_of, truth


def epoch_of(data, epoch):
    batches = data.train_dataloader()
    batches.batch_sampler.set_epoch(epoch)
    return batches


def test_a_row_and_a_batch_are_uint8_images_and_labels(photos):
    data = ImageData(str(photos), image_size=20, augment="none", batch_size=7, workers=0)
    dataset = data.dataset("train")
    image, label = dataset[0]
    assert (image.shape, image.dtype) == ((3, 20, 20), torch.uint8)
    assert (image.permute(1, 2, 0).numpy() == images.read(dataset.path(0), 20)).all()
    assert data.class_names[label] == Path(dataset.path(0)).parent.name
    batch = next(iter(data.train_dataloader()))
    assert (batch.image.shape, batch.image.dtype) == ((7, 3, 20, 20), torch.uint8)
    assert batch.image.is_contiguous(memory_format=torch.channels_last)  # the network's memory order
    assert (batch.label.shape, batch.label.dtype, batch.failed) == ((7,), torch.int64, [])


def test_unknown_resize_is_refused_at_once():
    with pytest.raises(UserError, match=r"^There is no resize crop:cubic; give"):
        ImageData("nowhere", resize="crop:cubic")


def test_a_set_without_a_readable_image_is_refused(photos):
    rows = manifest.load(photos)
    for split, count in (("val", 12), ("train", 84)):
        for row in rows.rows(split):
            (photos / rows.paths[row]).write_bytes(b"no image")
        said = rf"None of the {count} {split} images can be read.*not an image.* and {count - 3} more\. Replace them"
        with pytest.raises(UserError, match=said):
            ImageData(str(photos)).setup("fit")


def test_a_class_without_a_readable_training_image_ends_the_fit_and_is_left_out_of_other_averages(photos, capsys):
    rows = manifest.load(photos)
    for split, count in (("val", 4), ("train", 28)):
        files = [photos / rows.paths[row] for row in rows.rows(split) if rows.paths[row].startswith("blue")]
        for file in files[1:]:
            file.write_bytes(b"no image")
        ImageData(str(photos), batch_size=8).setup("fit")  # one is enough
        assert f"{split} images" not in capsys.readouterr().out
        files[0].write_bytes(b"no image")
        data = ImageData(str(photos), batch_size=8)
        if split == "train":
            with pytest.raises(UserError, match=f"None of the {count} train images of blue can be .*not an image"):
                data.setup("fit")
        else:
            data.setup("fit")
            data.setup("fit")  # as Lightning does
            out = capsys.readouterr().out
            assert out.count(f"None of the {count} val images of blue can be read") == 1
            assert "Precision, recall and AUROC of such a class cannot be measured" in out


def test_training_images_are_flipped_half_of_the_time(photos):
    dataset = ImageData(str(photos), image_size=20, augment="flip").dataset("train")
    flipped, unchanged = all_of(dataset), truth(dataset)
    same = (flipped == unchanged).all((1, 2, 3))
    assert (same | (flipped == unchanged[:, :, ::-1]).all((1, 2, 3))).all()
    assert 0.3 < same.mean() < 0.7


def test_digits_are_written_as_an_image_folder_once_by_many_processes_together(workplace):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.map(digits.write, [digits.ROOT] * 3)
    rows = manifest.load(digits.ROOT)
    assert [len(rows.rows(s)) for s in manifest.SPLITS] == [1259, 179, 359]
    assert rows.class_names == [str(d) for d in range(10)]
    with np.load(Path(digits.__file__).with_name("digits.npz")) as stored:
        image = np.asarray(Image.open(next(digits.ROOT.glob("*/*/0000.png"))))
        assert (image == stored["images"][0].astype(int) * 255 // 16).all()
    assert [p.name for p in (workplace / "data").iterdir()] == ["digits"]
    data = ImageData()
    assert (data.image_size, data.augment) == (64, "none")
    image = digits.ROOT / rows.paths[0]
    image.unlink()
    digits.write()
    assert not image.exists()  # a folder that is there is left alone
    with pytest.raises(UserError, match="Cannot write the digits into"):
        digits.write(digits.ROOT / rows.paths[1] / "digits")


@pytest.mark.parametrize(("count", "size"), [(3, 4), (40, 8), (1000, 64)])
def test_default_batch_suits_the_number_of_images(workplace, count, size):
    data = ImageData(str(workplace))
    assert (data.image_size, data.augment) == (224, "flip")
    data.manifest = manifest.Manifest(workplace, [], np.zeros(0, int), np.zeros(2 * round(0.7 * count), np.int8), [])
    assert data.batch_size == size


def test_augmentation_is_a_function_of_seed_epoch_and_row_and_of_training_images_alone(photos):
    data = ImageData(str(photos), image_size=40, augment="trivial", workers=0)
    for split, augmented in (("train", True), ("val", False), ("test", False)):
        dataset = data.dataset(split)
        assert (all_of(dataset, epoch=3) != truth(dataset)).any() == augmented
    dataset = data.dataset("train")
    torch.manual_seed(1)
    first = all_of(dataset)
    drawn = torch.rand(1)
    assert (all_of(dataset) == first).all()
    assert (all_of(dataset, epoch=1) != first).any()
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # the network's random numbers do not depend on it


def test_crop_starts_from_a_larger_image_and_shows_a_part_of_it():
    gradient = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = np.dstack([gradient, gradient.T, gradient])
    crops = [transforms.crop(image, np.random.default_rng(n), 224).astype(int) for n in range(50)]
    assert read_size(224, "crop") == 256
    widths = np.array([abs(crop[0, -1, 0] - crop[0, 0, 0]) for crop in crops])
    assert widths.min() < 120 < 220 < widths.max()
    shares = widths * [crop[-1, 0, 1] - crop[0, 0, 1] for crop in crops] / 256**2
    assert 0.05 < shares.min() < 0.25
    assert shares.max() > 0.8


def test_balance_draws_every_class_alike_or_weighs_classes_by_their_rarity_in_training_alone(workplace):
    make_images(workplace, {"red": 100, "blue": 20, "green": 10})
    data = ImageData(str(workplace), image_size=16, balance="sample", batch_size=10, workers=0)
    drawn = torch.cat([batch.label for epoch in range(8) for batch in epoch_of(data, epoch)])
    assert (torch.bincount(drawn) / len(drawn)).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    validated = torch.cat([batch.label for batch in data.val_dataloader()])
    assert torch.bincount(validated).tolist() == [2, 1, 10]
    assert data.class_weights is None
    labels = data.manifest.labels[data.manifest.rows("train")]
    weights = np.array(ImageData(str(workplace), balance="loss").class_weights)
    assert weights * np.bincount(labels) == pytest.approx([len(labels) / 3] * 3)
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # more than the cores here, on purpose
def test_cached_batches_are_those_that_are_read(photos):
    def batches(**options):
        data = ImageData(str(photos), image_size=24, augment="crop", batch_size=16, **options)
        return [batch.image for epoch in (0, 1) for batch in epoch_of(data, epoch)]

    read = batches(cache="off", workers=0)
    assert not Path("data/cache").exists()
    for count in (0, 1, 4):
        assert all(torch.equal(a, b) for a, b in zip(read, batches(cache="on", workers=count), strict=True))
    assert len(list(Path("data/cache").glob("*-27-stretch.pixels"))) == 1


def sampler(**options):
    return BatchSampler(**({"rows": 103, "batch_size": 8, "shuffle": True, "seed": 5} | options))


def test_shuffled_order_changes_with_epoch_and_seed_and_nothing_else_and_continues_at_a_batch():
    batches, epochs = sampler(), []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert {key[0] for batch in epochs[-1] for key in batch} == {epoch}  # the epoch travels with the row
    assert epochs[0] == epochs[2] == list(sampler()) != list(sampler(seed=6))
    first, second = ([row for batch in epoch for _, row in batch] for epoch in epochs[:2])
    assert first != second
    batches.start_from(1, 7)
    assert list(batches) == epochs[1][7:]
    assert list(batches) == epochs[1]  # the next time, from the start


def test_training_leaves_out_the_incomplete_batch_and_evaluation_does_not():
    assert [len(batch) for batch in sampler()] == [8] * 12
    assert [len(batch) for batch in sampler(shuffle=False)] == [8] * 12 + [7]
    assert [row for batch in sampler(shuffle=False) for _, row in batch] == list(range(103))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("order", [{}, {"shuffle": False}, {"weights": np.arange(1.0, 104.0)}])
def test_ranks_share_the_same_global_batches_without_repeats(world_size, order):
    ranks = [sampler(**order, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *shares in zip(sampler(**order), *ranks, strict=True):  # strict: no rank waits for another
        assert sorted(key for share in shares for key in share) == sorted(batch)


def test_signals_for_all_processes_do_not_end_a_worker_that_is_still_starting():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers.start_server()
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result()
    assert {signal.SIGINT, signal.SIGTERM} <= blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        (
            "9:name=systemd:/\n4:cpuacct,cpu:/docker/1",
            {"cpu/cpu.cfs_quota_us": 50000, "cpu/cpu.cfs_period_us": 100000},
            1,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 64),
        ("4:memory:/a", {"cpu/a/cpu.cfs_quota_us": 50000, "cpu/a/cpu.cfs_period_us": 100000}, 64),
    ],
)
def test_a_cpu_quota_counts_as_cores_do(group, files, cores, tmp_path, monkeypatch):
    (tmp_path / "own").write_text(f"{group}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(workers, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(workers, "CGROUPS", tmp_path)
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    workers.limit_threads()
    assert workers.usable_cores() == cores
    assert os.environ.get("OMP_NUM_THREADS", "64") == str(cores)


@pytest.mark.parametrize(("megabytes", "expected"), [(1000, (8, 2)), (64, (1, 1)), (160, (6, 1)), (32, (0, 0))])
def test_workers_read_no_more_ahead_than_shared_memory_holds(megabytes, expected, monkeypatch, capsys, photos):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: Mock(free=megabytes << 20))
    assert ImageData("photos", batch_size=64, workers=8).reading == expected
    out = capsys.readouterr().out
    assert ("docker run --shm-size" in out and f"has {megabytes} of the" in out) == (expected != (8, 2))
