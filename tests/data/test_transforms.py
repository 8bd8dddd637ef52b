"""transforms.py: augmentation, and transforms after it that a class path names."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision.transforms import v2

from project import cli
from project.data.datamodule import ImageData
from project.data.loader import BatchSampler, loader
from project.data.transforms import seeded
from project.errors import UserError
from project.evaluation import figures
from project.parts import require_trusted_options
from tests.conftest import SMALL, read_csv
from tests.data.test_cache import all_of, truth

V2 = "torchvision.transforms.v2"
ROTATION = {"class_path": f"{V2}.RandomRotation", "init_args": {"degrees": 10}}
GREY = {"class_path": f"{V2}.Grayscale", "init_args": {"num_output_channels": 3}}
FLOAT = {"class_path": f"{V2}.ToDtype", "init_args": {"dtype": "torch.float32"}}


class Shift(nn.Module):
    """Draws from every global generator; changes its input in place."""

    def forward(self, image):
        return image.add_(random.randrange(9) + int(np.random.randint(9)) + int(torch.randint(9, ())))


def images_of(dataset, workers, ranks):
    """The images of an epoch, by row, of all ranks."""
    found = {}
    for rank in range(ranks):
        sampler = BatchSampler(len(dataset), 16, shuffle=True, rank=rank, world_size=ranks)
        sampler.set_epoch(3)
        for batch in loader(dataset, sampler, workers):
            found |= dict(zip(batch.row.tolist(), batch.image, strict=True))
    return found


@pytest.mark.slow
def test_what_is_drawn_depends_on_seed_epoch_and_row_alone_whatever_the_generator_it_is_drawn_from(photos):
    transforms = [ROTATION, f"{__name__}.Shift", v2.RandomErasing(p=0.5, value="random")]
    data = ImageData(str(photos), image_size=24, augment="randaugment", transforms=transforms, workers=0)
    dataset = data.dataset("train")
    alone = images_of(dataset, 0, 1)
    assert len(alone) == 80
    for workers, ranks in ((2, 1), (0, 3)):
        shared = images_of(dataset, workers, ranks)
        assert shared.keys() == alone.keys()
        assert all(torch.equal(shared[row], image) for row, image in alone.items())
    with ThreadPoolExecutor(4) as pool:  # as setup reads
        found = pool.map(lambda row: dataset.__getitems__([(3, row)]).image[0], alone)
        assert all(torch.equal(image, alone[row]) for row, image in zip(alone, found, strict=True))
    assert any((all_of(dataset, epoch) != all_of(dataset, 3)).any() for epoch in (0, 1))
    other = ImageData(str(photos), image_size=24, augment="randaugment", transforms=transforms, workers=0, seed=1)
    assert (all_of(other.dataset("train")) != all_of(dataset)).any()


def test_transforms_come_after_the_augmentation_of_training_images_alone_and_never_reach_the_cache(photos):
    shift = {"class_path": f"{__name__}.Shift", "init_args": {}}
    data = ImageData(str(photos), image_size=24, augment="none", transforms=[shift, GREY], cache="on", workers=0)
    assert data.hparams["transforms"] == [shift, GREY]  # for fit --ckpt_path from a plain Trainer's checkpoint
    for split in ("train", "val", "test"):
        dataset = data.dataset(split)
        first = all_of(dataset)
        assert (all_of(dataset) == first).all()  # the second time from the cache
        assert (first == truth(dataset)).all() == (split != "train")
        if split == "train":
            assert (first[..., 0] == first[..., 2]).all()
    assert len(list(Path("data/cache").glob("*.pixels"))) == 1
    plain = ImageData(str(photos), image_size=24, augment="none", cache="on", workers=0).dataset("train")
    assert (all_of(plain) == truth(plain)).all()
    assert len(list(Path("data/cache").glob("*.pixels"))) == 1


@pytest.mark.parametrize("augment", ["trivial", "randaugment"])
def test_drawing_leaves_the_global_generators_as_they_were(photos, augment):
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    data = ImageData(str(photos), image_size=24, augment=augment, transforms=[f"{__name__}.Shift"], workers=0)
    drawn = []
    for shows in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if shows:
            with seeded(np.random.default_rng(2)):  # as one's own data set, in which these images are, is read
                all_of(data.dataset("train"))
        drawn.append(draw())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        (FLOAT, r"ToDtype does not make a uint8 image \(3, 24, 24\) of one: it gives torch.float32 \(3, 24, 24\)$"),
        ({"class_path": f"{V2}.RandomApply", "init_args": {"transforms": [FLOAT], "p": 0.2}}, "RandomApply does not"),
        ({"class_path": f"{V2}.Resize", "init_args": {"size": 9}}, r"it gives torch.uint8 \(3, 9, 9\)$"),
        ({"class_path": f"{V2}.Normalize", "init_args": {"mean": [0.5], "std": [0.5]}}, "should be a float tensor"),
        ({"class_path": f"{V2}.FiveCrop", "init_args": {"size": 9}}, "FiveCrop does not make a uint8 image"),
        (f"{V2}.RandomRotatio", "no such class.* Did you mean RandomRotation?"),
        ({"class_path": f"{V2}.RandomRotation"}, "degrees"),
        ({"init_args": {}}, "no such class; give package.module.Class"),
    ],
    ids=str,
)
def test_transforms_that_do_not_give_uint8_images_of_the_same_size_are_refused_by_name(photos, entry, sentence):
    with pytest.raises(UserError, match=f"data.transforms.*{sentence}"):
        ImageData(str(photos), image_size=24, transforms=[GREY, entry])


@pytest.mark.slow
def test_fit_takes_transforms_by_class_path_and_refuses_before_there_is_a_run(photos, refused):
    fit = ["fit", "--data.root", str(photos), *SMALL, "--trainer.limit_train_batches", "2"]
    sentence = refused(*fit, "--data.transforms", yaml.safe_dump([FLOAT], default_flow_style=True))
    assert "ToDtype" in sentence
    assert not Path("runs").exists()
    rotation = ["--data.transforms+=RandomRotation", "--data.transforms.degrees=10"]
    assert cli.main([*fit, *rotation, "--trainer.max_epochs", "1"]) == 0
    run = Path("runs/photos/version_0")
    recorded = yaml.safe_load((run / "config.yaml").read_text())["data"]["transforms"]
    assert [(part["class_path"], part["init_args"]["degrees"]) for part in recorded] == [(ROTATION["class_path"], 10)]
    resume = ["fit", "--resume", str(run), "--trainer.max_epochs", "2"]
    others = ["--data.transforms+=RandomRotation", "--data.transforms.degrees=20"]
    assert "--data.transforms [{" in (sentence := refused(*resume, *others))
    assert "that changes the result" in sentence
    assert cli.main([*resume, *rotation]) == 0  # the command that began the run, as after a requeue
    assert read_csv(run / "metrics.csv")[-1]["epoch"] == "1"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["transforms"] == recorded
    # whoever writes a checkpoint or a run's options must not choose what code runs
    bad = [{"class_path": f"{V2}.Lambda", "init_args": {"lambd": "os.system"}}]
    for name in ("best.ckpt", "last.ckpt"):
        content = torch.load(run / "checkpoints" / name, weights_only=True)
        content["metadata"]["config"]["data"]["transforms"] = bad
        torch.save(content, name)
    last = ["--trainer.max_epochs", "3"]
    assert "last.ckpt names os.system; a file may" in refused("fit", "--ckpt_path", "last.ckpt", *last)
    assert cli.main(["validate", "--ckpt_path", "best.ckpt"]) == 0  # has no use for them
    options = yaml.safe_load((run / "config.yaml").read_text())
    options["data"]["transforms"] = bad
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    assert "config.yaml names os.system; a file may" in refused("fit", "--resume", str(run), *last)


@pytest.mark.parametrize(
    ("transforms", "names"),
    [
        ([ROTATION, {"class_path": f"{V2}.Compose", "init_args": {"transforms": [GREY]}}], ""),
        ([{"class_path": f"{V2}.Lambda", "init_args": {"lambd": "os.system"}}], "os.system"),
        ([{"class_path": f"{V2}.Compose", "init_args": {"transforms": [{"class_path": "evil.Own"}]}}], "evil.Own"),
        ([{"class_path": f"{V2}.RandomRotation", "init_args": {}, "dict_kwargs": {"fill": "os.getcwd"}}], "os.getcwd"),
        (["evil.Own"], "evil.Own"),
        ([f"{V2}.functional.rotate"], f"{V2}.functional.rotate"),
        ([{"class_path": "torchvision.datasets.MNIST"}], "torchvision.datasets.MNIST"),
    ],
)
def test_a_file_may_name_torchvisions_transforms_only(transforms, names):
    options = {"data": {"transforms": transforms}, "model": {}, "trainer": {}}
    if names:
        with pytest.raises(UserError, match=rf"^it names {names}; .* add --trust {names}\.$"):
            require_trusted_options(options, (), "it")
    require_trusted_options(options, {names}, "it")


def test_preview_shows_what_a_configuration_does_to_training_images(photos, monkeypatch, refused):
    shown = []
    monkeypatch.setattr(figures, "image_grid", lambda images, titles, **_: shown.append(images) or figures.Figure())
    data = {"root": "elsewhere", "augment": "randaugment", "image_size": 40, "resize": "crop", "transforms": [GREY]}
    Path("fit.yaml").write_text(yaml.safe_dump({"seed_everything": 3, "data": data}))
    check = ["check", str(photos), "--config", "fit.yaml", "--preview"]
    assert cli.main([*check, "a.png"]) == 0
    assert cli.main([*check, "b.png", "--image_size", "32"]) == 0  # the command line's word is the last one
    assert [images.shape for images in shown] == [(24, 40, 40, 3), (24, 32, 32, 3)]
    is_grey = [(image[..., 0] == image[..., 2]).all() for image in shown[0]]
    assert is_grey == [True] * 18 + [False] * 6  # six training images three times, six validation images
    for text, part in (
        ("data: {augment: flop}", "--data.augment is flop; it takes none or flip"),
        ("data: {transforms: [3]}", "--data.transforms is 3"),
        (yaml.safe_dump({"data": {"transforms": [FLOAT]}}), "--data.transforms ToDtype does not make"),
        ("- data", "--config fit.yaml: this is no YAML file of a fit's options"),
    ):
        Path("fit.yaml").write_text(text)
        assert part in refused(*check, "c.png")
    assert "--config nowhere.yaml: this is no" in refused("check", str(photos), "--config", "nowhere.yaml")
    assert not Path("c.png").exists()
