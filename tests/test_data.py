"""dataset.py, transforms.py, digits.py and datamodule.py."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from project.data import dataset as dataset_module
from project.data import digits, images, manifest, transforms
from project.data.datamodule import ImageData
from project.data.dataset import ImageDataset, loader
from project.data.sampler import BatchSampler
from project.errors import UserError
from tests.conftest import make_pictures


def test_a_row_is_a_uint8_image_and_its_label(photos):
    data = ImageData(str(photos), image_size=20, augment="none")
    dataset = data.dataset("train")
    image, label = dataset[0]
    assert (image.shape, image.dtype) == ((3, 20, 20), torch.uint8)
    expected = images.read(dataset.path(0), 20)
    assert (image.permute(1, 2, 0).numpy() == expected).all()
    assert data.class_names[label] == Path(dataset.path(0)).parent.name


def test_a_batch_is_uint8_in_the_networks_memory_order(photos):
    data = ImageData(str(photos), image_size=20, batch_size=7, workers=0)
    batch = next(iter(data.train_dataloader()))
    assert (batch.image.shape, batch.image.dtype) == ((7, 3, 20, 20), torch.uint8)
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert (batch.label.shape, batch.label.dtype, batch.failed) == ((7,), torch.int64, [])


def test_unreadable_picture_is_named_not_replaced(photos):
    bad = sorted(photos.glob("red/*.png"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_bytes(b"")
    paths = [f"red/{p.name}" for p in bad] + ["red/010.png", "blue/000.png"]
    batch = ImageDataset(photos, paths, np.array([2, 2, 2, 0]), 16).__getitems__([(0, r) for r in range(4)])
    assert batch.row.tolist() == [2, 3]
    assert batch.label.tolist() == [2, 0]
    assert len(batch.image) == 2
    assert [row for row, _ in batch.failed] == [0, 1]
    assert (batch.image[0].permute(1, 2, 0).numpy() == images.read(photos / "red/010.png", 16)).all()


def test_training_pictures_are_flipped_half_of_the_time_and_others_never(photos):
    data = ImageData(str(photos), image_size=20, augment="flip")
    dataset = data.dataset("train")
    plain = np.stack([images.read(dataset.path(row), 20) for row in range(len(dataset))])
    image = dataset.__getitems__([(0, r) for r in range(len(dataset))]).image.permute(0, 2, 3, 1).numpy()
    same = (image == plain).all((1, 2, 3))
    assert (same | (image == plain[:, :, ::-1]).all((1, 2, 3))).all()
    assert 0.3 < same.mean() < 0.7
    again = dataset.__getitems__([(1, r) for r in range(len(dataset))]).image.permute(0, 2, 3, 1).numpy()
    assert (image != again).any()  # another epoch, another draw
    for split in ("val", "test"):
        assert data.dataset(split).augment is not dataset.augment


@pytest.mark.parametrize("context", ["fork", "forkserver", "spawn"])
def test_batches_are_the_same_whatever_the_workers(photos, context):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not start processes by {context}")
    data = ImageData(str(photos), image_size=16, augment="flip", batch_size=32)
    dataset = data.dataset("train")

    def epoch(workers, context=None):
        made = loader(dataset, BatchSampler(len(dataset), 32, shuffle=True), workers)
        made.multiprocessing_context = context
        return list(made)

    for one, two in zip(epoch(0), epoch(2, context), strict=True):
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.label, two.label)


def test_dataset_holds_no_pixels(photos):
    data = ImageData(str(photos), image_size=224)
    before = len(pickle.dumps(data.dataset("train")))
    list(loader(data.dataset("train"), BatchSampler(84, 8, shuffle=False), 0))
    assert len(pickle.dumps(data.dataset("train"))) == before < 10_000


def test_digits_are_written_as_an_image_folder(workplace):
    digits.write()
    rows = manifest.load(digits.ROOT)
    assert [len(rows.rows(s)) for s in manifest.SPLITS] == [1259, 179, 359]
    assert rows.class_names == [str(d) for d in range(10)]
    with np.load(Path(digits.__file__).with_name("digits.npz")) as stored:
        picture = np.asarray(Image.open(next(digits.ROOT.glob("*/*/0000.png"))))
        assert (picture == stored["images"][0].astype(int) * 255 // 16).all()
    assert [p.name for p in (workplace / "data").iterdir()] == ["digits"]


def test_digits_written_by_many_processes_at_once_are_whole(workplace):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(digits.write, [digits.ROOT] * 8)
    assert len(list(digits.ROOT.rglob("*.png"))) == 1797
    assert [p.name for p in (workplace / "data").iterdir()] == ["digits"]


def test_digits_that_are_there_are_left_alone(workplace):
    make_pictures(digits.ROOT, {"mine": 3})
    digits.write()
    assert len(list(digits.ROOT.rglob("*.png"))) == 3


def test_sizes_and_augmentation_depend_on_the_data(photos):
    own, bundled = ImageData(str(photos)), ImageData()
    assert (own.image_size, own.augment) == (224, "flip")
    assert (bundled.image_size, bundled.augment) == (64, "none")


@pytest.mark.parametrize(("count", "size"), [(3, 4), (40, 8), (1000, 64)])
def test_default_batch_suits_the_number_of_pictures(workplace, count, size):
    rows = manifest.Manifest(workplace, [], np.zeros(0, int), np.zeros(2 * round(0.7 * count), np.int8), ["a", "b"])
    data = ImageData(str(workplace))
    data.manifest = rows
    assert data.batch_size == size


def test_a_set_without_one_readable_picture_is_refused(photos):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"None of the 84 train pictures can be read.*not a picture"):
        ImageData(str(photos)).setup("fit")


@pytest.mark.parametrize("augment", ["crop", "trivial"])
def test_random_augmentation_is_a_function_of_seed_epoch_and_row(photos, augment):
    data = ImageData(str(photos), image_size=40, augment=augment, batch_size=16, workers=0)
    dataset = data.dataset("train")
    keys = [(epoch, row) for epoch in range(2) for row in range(16)]
    torch.manual_seed(1)
    first = dataset.__getitems__(keys).image
    drawn = torch.rand(1)
    assert first.shape == (32, 3, 40, 40)
    assert torch.equal(dataset.__getitems__(keys).image, first)
    assert not torch.equal(first[:16], first[16:])
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))  # the network's random numbers do not depend on it


@pytest.mark.parametrize("augment", ["flip", "crop", "trivial"])
def test_augmentation_never_reaches_validation_or_test_pictures(photos, augment):
    data = ImageData(str(photos), image_size=40, augment=augment, workers=0)
    for split, augmented in (("train", True), ("val", False), ("test", False)):
        dataset = data.dataset(split)
        plain = np.stack([images.read(dataset.path(row), 40) for row in range(len(dataset))])
        seen = dataset.__getitems__([(3, row) for row in range(len(dataset))]).image.permute(0, 2, 3, 1).numpy()
        assert (seen != plain).any() == augmented


def test_crop_starts_from_a_larger_picture_and_shows_a_part_of_it(photos):
    gradient = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    seen = [
        transforms.crop(np.dstack([gradient, gradient.T, gradient]), np.random.default_rng(n), 224) for n in range(50)
    ]
    assert dataset_module.read_size(224, "crop") == 256
    widths = [abs(int(image[0, -1, 0]) - int(image[0, 0, 0])) for image in seen]
    heights = [int(image[-1, 0, 1]) - int(image[0, 0, 1]) for image in seen]
    assert min(widths) < 120 < 220 < max(widths)
    shares = np.array(widths) * heights / 256**2
    assert 0.05 < shares.min() < 0.25
    assert shares.max() > 0.8


@pytest.fixture
def unequal(workplace):
    return make_pictures(workplace / "photos", {"red": 100, "blue": 20, "green": 10})


def test_balance_by_sampling_draws_every_class_alike_in_training_alone(unequal):
    data = ImageData(str(unequal), image_size=16, balance="sample", batch_size=10, workers=0)
    drawn = torch.cat([batch.label for epoch in range(8) for batch in epochs(data, epoch)])
    shares = torch.bincount(drawn).double() / len(drawn)
    assert shares.numpy() == pytest.approx([1 / 3] * 3, abs=0.06)
    validated = torch.cat([batch.label for batch in data.val_dataloader()])
    assert torch.bincount(validated).tolist() == [2, 1, 10]


def epochs(data, epoch):
    made = data.train_dataloader()
    made.batch_sampler.set_epoch(epoch)
    return made


def test_balance_by_loss_weighs_classes_by_their_rarity_and_pictures_1_on_average(unequal):
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
        return [batch.image for epoch in (0, 1) for batch in epochs(data, epoch)]

    plain = batches(cache="off", workers=0)
    assert not Path("data/cache").exists()
    for workers in (0, 1, 4):
        assert all(torch.equal(a, b) for a, b in zip(plain, batches(cache="on", workers=workers), strict=True))
    assert len(list(Path("data/cache").glob("*-27-stretch.pixels"))) == 1
    assert not list(Path("data/cache").glob("*.full"))
