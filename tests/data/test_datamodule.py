"""dataset.py, transforms.py, digits.py, loader.py and datamodule.py."""

import multiprocessing
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from project.data import digits, images, manifest, transforms
from project.data import workers as processes
from project.data.datamodule import ImageData
from project.data.dataset import ImageDataset, read_size
from project.data.loader import BatchSampler
from project.errors import UserError
from tests.conftest import make_images


def pixels(dataset, epoch=0):
    """All images of a set (N, H, W, 3)."""
    keys = [(epoch, row) for row in range(len(dataset))]
    return dataset.__getitems__(keys).image.permute(0, 2, 3, 1).numpy()


def plain(dataset):
    return np.stack([images.read(dataset.path(row), dataset.image_size) for row in range(len(dataset))])


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
    before = len(pickle.dumps(dataset))
    batch = next(iter(data.train_dataloader()))
    assert len(pickle.dumps(dataset)) == before < 10_000  # no pixels
    assert (batch.image.shape, batch.image.dtype) == ((7, 3, 20, 20), torch.uint8)
    assert batch.image.is_contiguous(memory_format=torch.channels_last)  # the network's memory order
    assert (batch.label.shape, batch.label.dtype, batch.failed) == ((7,), torch.int64, [])


def test_unreadable_image_is_named_not_replaced_and_a_set_without_a_readable_one_refused(photos):
    bad = sorted(photos.glob("red/*.png"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_bytes(b"")
    paths = [f"red/{p.name}" for p in bad] + ["red/010.png", "blue/000.png"]
    batch = ImageDataset(photos, paths, np.array([2, 2, 2, 0]), 16).__getitems__([(0, r) for r in range(4)])
    assert (batch.row.tolist(), batch.label.tolist(), len(batch.image)) == ([2, 3], [2, 0], 2)
    assert [row for row, _ in batch.failed] == [0, 1]
    assert (batch.image[0].permute(1, 2, 0).numpy() == images.read(photos / "red/010.png", 16)).all()
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"None of the 84 train images can be read.*not an image"):
        ImageData(str(photos)).setup("fit")


def test_training_images_are_flipped_half_of_the_time(photos):
    dataset = ImageData(str(photos), image_size=20, augment="flip").dataset("train")
    flipped, unchanged = pixels(dataset), plain(dataset)
    same = (flipped == unchanged).all((1, 2, 3))
    assert (same | (flipped == unchanged[:, :, ::-1]).all((1, 2, 3))).all()
    assert 0.3 < same.mean() < 0.7
    assert (flipped != pixels(dataset, epoch=1)).any()


def test_digits_are_written_as_an_image_folder_by_many_processes_at_once(workplace):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(digits.write, [digits.ROOT] * 8)
    rows = manifest.load(digits.ROOT)
    assert [len(rows.rows(s)) for s in manifest.SPLITS] == [1259, 179, 359]
    assert rows.class_names == [str(d) for d in range(10)]
    with np.load(Path(digits.__file__).with_name("digits.npz")) as stored:
        image = np.asarray(Image.open(next(digits.ROOT.glob("*/*/0000.png"))))
        assert (image == stored["images"][0].astype(int) * 255 // 16).all()
    assert [p.name for p in (workplace / "data").iterdir()] == ["digits"]
    data = ImageData()
    assert (data.image_size, data.augment) == (64, "none")


def test_digits_that_are_there_are_left_alone_and_a_folder_that_cannot_be_made_is_refused(workplace):
    make_images(digits.ROOT, {"mine": 3})
    digits.write()
    assert len(list(digits.ROOT.rglob("*.png"))) == 3
    with pytest.raises(UserError, match="Cannot write the digits into"):
        digits.write(digits.ROOT / "mine" / "000.png" / "digits")


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
        assert (pixels(dataset, epoch=3) != plain(dataset)).any() == augmented
    dataset = data.dataset("train")
    torch.manual_seed(1)
    first = pixels(dataset)
    drawn = torch.rand(1)
    assert (pixels(dataset) == first).all()
    assert (pixels(dataset, epoch=1) != first).any()
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


@pytest.fixture
def unequal(workplace):
    return make_images(workplace / "photos", {"red": 100, "blue": 20, "green": 10})


def test_balance_by_sampling_draws_every_class_alike_in_training_alone(unequal):
    data = ImageData(str(unequal), image_size=16, balance="sample", batch_size=10, workers=0)
    drawn = torch.cat([batch.label for epoch in range(8) for batch in epoch_of(data, epoch)])
    assert (torch.bincount(drawn) / len(drawn)).tolist() == pytest.approx([1 / 3] * 3, abs=0.06)
    validated = torch.cat([batch.label for batch in data.val_dataloader()])
    assert torch.bincount(validated).tolist() == [2, 1, 10]


def test_balance_by_loss_weighs_classes_by_their_rarity_and_images_1_on_average(unequal):
    data = ImageData(str(unequal), balance="loss")
    labels = data.manifest.labels[data.manifest.rows("train")]
    weights = np.array(data.class_weights)
    assert weights * np.bincount(labels) == pytest.approx([len(labels) / 3] * 3)
    assert weights[labels].mean() == pytest.approx(1)
    assert ImageData(str(unequal)).class_weights is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # more than the cores here, on purpose
def test_cached_batches_are_those_that_are_read(photos):
    def batches(**options):
        data = ImageData(str(photos), image_size=24, augment="crop", batch_size=16, **options)
        return [batch.image for epoch in (0, 1) for batch in epoch_of(data, epoch)]

    read = batches(cache="off", workers=0)
    assert not Path("data/cache").exists()
    for workers in (0, 1, 4):
        assert all(torch.equal(a, b) for a, b in zip(read, batches(cache="on", workers=workers), strict=True))
    assert len(list(Path("data/cache").glob("*-27-stretch.pixels"))) == 1


def batches_of(**options):
    return list(BatchSampler(**({"rows": 103, "batch_size": 8, "shuffle": True, "seed": 5} | options)))


def test_shuffled_order_changes_with_epoch_and_seed_and_nothing_else():
    sampler = BatchSampler(103, 8, shuffle=True, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([[row for _, row in batch] for batch in sampler])
    assert orders[2] == orders[0] != orders[1]
    assert batches_of(seed=6) != batches_of()


def test_training_leaves_out_the_incomplete_batch_and_evaluation_does_not():
    assert [len(b) for b in batches_of()] == [8] * 12
    assert [len(b) for b in batches_of(shuffle=False)] == [8] * 12 + [7]
    assert [row for b in batches_of(shuffle=False) for _, row in b] == list(range(103))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(
    "order", [{"shuffle": True}, {"shuffle": False}, {"shuffle": True, "weights": np.arange(1.0, 104.0)}]
)
def test_ranks_share_the_same_global_batches_without_repeats(world_size, order):
    whole = batches_of(**order)
    ranks = [batches_of(**order, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(whole)}  # no rank waits for another
    for number, batch in enumerate(whole):
        assert sorted(key for rank in ranks for key in rank[number]) == sorted(batch)


def test_order_continues_at_a_batch_of_an_epoch():
    whole = BatchSampler(103, 8, shuffle=True, seed=5)
    whole.set_epoch(2)
    expected = list(whole)
    assert {epoch for batch in expected for epoch, _ in batch} == {2}  # the epoch travels with the row
    again = BatchSampler(103, 8, shuffle=True, seed=5)
    again.start_from(2, 7)
    assert list(again) == expected[7:]
    assert list(again) == expected  # the next time, from the start


def send_handler(pipe):
    pipe.send(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


def test_ctrl_c_does_not_end_a_worker_that_is_still_starting():
    before = signal.getsignal(signal.SIGINT)
    processes.start_server()
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=send_handler, args=(sending,))
    process.start()
    assert receiving.poll(60)
    assert receiving.recv()
    process.join()
    assert signal.getsignal(signal.SIGINT) is before
