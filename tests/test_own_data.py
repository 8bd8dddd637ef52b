"""Data and a model of one's own by class path: the contract in data/own.py, the verbs, and who is trusted."""

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from project import Classifier, cli, fit, load
from project.data.own import OwnData
from project.errors import UserError
from tests.conftest import SEED, read_csv
from tests.same_run import checkpoint, differences, logged

OWN = """
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, random_split

from project import Classifier, ImageData
from project.data import manifest


class Shades(Dataset):
    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        image = torch.full((3, self.size, self.size), 40 + 120 * (row % 2), dtype=torch.uint8)
        return image + torch.randint(0, 40, (1,)).to(torch.uint8), row % 2


class Source(LightningDataModule):
    def __init__(self, count: int = 80, image_size: int = 32, where: Path = Path("here"), parts: list[str] = [],
                 net: nn.Module | None = None):
        super().__init__()
        self.count, self.image_size, self.where, self.class_names = count, image_size, where, ["dark", "light"]

    def setup(self, stage):
        assert isinstance(self.where, Path)
        self.splits = random_split(Shades(self.count, self.image_size), [0.5, 0.25, 0.25])

    def train_dataloader(self):
        return DataLoader(self.splits[0], batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.splits[1], batch_size=8)

    def test_dataloader(self):
        return DataLoader(self.splits[2], batch_size=8)


class Untested(Source):
    test_dataloader = LightningDataModule.test_dataloader


class Pairs(Dataset):
    def __init__(self, image, label):
        self.image, self.label = image, label

    def __len__(self):
        return 16

    def __getitem__(self, row):
        return self.image if self.label is None else (self.image, self.label)


IMAGE = torch.zeros(3, 32, 32, dtype=torch.uint8)
BROKEN = {
    "Float": Pairs(IMAGE.float(), 0),
    "Small": Pairs(IMAGE[:, :16], 0),
    "Last": Pairs(IMAGE.permute(1, 2, 0), 0),
    "Bare": Pairs(IMAGE, None),
    "Mapping": Pairs({"image": IMAGE}, None),
    "Above": Pairs(IMAGE, 2),
    "Negative": Pairs(IMAGE, -1),
    "Words": Pairs(IMAGE, "dark"),
    "OneHot": Pairs(IMAGE, [0.0, 1.0]),
    "Stream": type("Endless", (IterableDataset,), {"__iter__": lambda self: iter([(IMAGE, 0)])})(),
}
for name, pairs in BROKEN.items():
    globals()[name] = type(name, (Source,), {"train_dataloader": lambda self, pairs=pairs: DataLoader(pairs, 8)})


class Unnamed(Source):
    def setup(self, stage):
        super().setup(stage)
        del self.class_names


class Twice(Source):
    def setup(self, stage):
        super().setup(stage)
        self.class_names = ["dark", "dark"]


class Sizeless(Source):
    def setup(self, stage):
        super().setup(stage)
        self.image_size = None


class Several(Source):
    def train_dataloader(self):
        return [super().train_dataloader()]


class Listed(ImageData):
    def __init__(self, listing: str, **options):
        super().__init__(**options)
        self.listing = listing

    @cached_property
    def manifest(self):
        rows = [line.split() for line in Path(self.listing).read_text().splitlines()]
        paths, labels, splits = zip(*rows)
        numbers = [np.array(column, int) for column in (labels, splits)]
        return manifest.Manifest(self.root, list(paths), numbers[0], numbers[1].astype(np.int8), ["blue", "red"])


class Narrow(ImageData):
    def __init__(self, root: str = "photos"):
        super().__init__(root)


class Scaled(Classifier):
    def __init__(self, factor: float = 2.0, **options):
        super().__init__(**options)
        self.factor = factor

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("val/quality", 0.5)
        return self.factor * loss


class Closed(Classifier):
    def __init__(self, class_names: list, image_size: int):
        super().__init__(class_names, image_size)


class Raw(LightningModule):
    pass
"""
NET = ["--model.name", "squeezenet1_1", "--trainer.limit_train_batches", "2", *SEED]
ONE = [*NET, "--trainer.max_epochs", "1"]
SOURCE = ["--data.class_path", "own.Source"]
TRUST = ["--trust", "own.Source"]


@pytest.fixture
def own(photos, monkeypatch):
    """The current folder has photos/ and the modules own and evil, as on the path of `python -m`."""
    Path("own.py").write_text(OWN)
    Path("evil.py").write_text("open('executed', 'w')\nfrom torch import nn\n\n\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(Path.cwd())
    yield
    for name in ("own", "evil"):
        sys.modules.pop(name, None)


def run(*words):
    """Runs a command that must succeed; returns the newest run."""
    assert cli.main(list(words)) == 0
    os.environ.pop("PROJECT_RUN", None)
    return Path("runs/latest").resolve()


@pytest.mark.slow
def test_own_module_in_every_verb_and_which_of_them_need_trust(own, capsys, refused):
    made = run("fit", *SOURCE, "--data.init_args.count", "96", "--data.where", "there", *ONE)
    said = capsys.readouterr().out
    assert "own.Source: 96 images, 2 classes, train 48 / val 24 / test 24" in said
    assert "batches of 8" in said
    assert "test runs/own.Source/version_0 --trust own.Source" in said
    assert "predict runs/own.Source/version_0 IMAGES" in said
    data = yaml.safe_load((made / "config.yaml").read_text())["data"]
    assert data == {
        "class_path": "own.Source",
        "count": 96,
        "image_size": 32,
        "where": "there",
        "parts": [],
        "net": None,
    }
    last = str(made / "checkpoints" / "last.ckpt")
    for words in (
        ["test", "runs/latest"],
        ["validate", "runs/latest"],
        ["fit", "--resume", "runs/latest", "--trainer.max_epochs", "2"],
        ["fit", "--ckpt_path", last, "--trainer.max_epochs", "3"],
    ):
        assert "names own.Source" in refused(*words)
        run(*words, *TRUST)
    tested = read_csv(made / "predictions.csv")
    assert [row["path"] for row in tested] == [f"test/{number:06}" for number in range(24)]
    assert {row["true"] for row in tested} == {"dark", "light"}
    run("test", str(made), *TRUST)  # of the resumed run
    run("report", str(made))
    run("predict", str(made), "photos/red")
    run("explain", str(made), "photos/red/000.png")
    capsys.readouterr()
    run("export", str(made))
    assert "compared on 64 generated images" in capsys.readouterr().out
    assert "64 generated images, from" in (made / "bundle" / "README.md").read_text()
    assert load(made / "bundle").predict(["photos/red/000.png"])[0].label in ("dark", "light")
    assert "export needs training images" in refused("export", str(made), "--out", "small", "--quantize", "int8")


@pytest.mark.slow
def test_a_fit_on_an_own_module_that_is_resumed_within_an_epoch_is_the_same(own, monkeypatch):
    options = [*SOURCE, "--model.name", "squeezenet1_1", "--trainer.max_epochs", "2", *SEED]
    whole = run("fit", *options, "--name", "whole")
    step = Classifier.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Classifier, "training_step", stopped)
        assert cli.main(["fit", *options, "--name", "half"]) == 130
    half = run("fit", "--resume", "runs/half/version_0", *TRUST)
    assert not differences(checkpoint(whole), checkpoint(half))
    assert logged(whole)[1] == logged(half)[1]


def test_what_is_drawn_at_random_depends_on_seed_epoch_and_row_and_splits_are_the_same_in_each_verb(own):
    import own as module

    def made(verb, seed=0):
        data = OwnData(module.Source(), "own.Source", verb)
        data.seed = seed
        return data

    torch.manual_seed(1)
    fitted = made("fit")
    torch.manual_seed(2)
    tested, train = made("test"), fitted.dataset("train")
    rows = {split: set(fitted.dataset(split).pairs.indices) for split in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == len(set.union(*rows.values()))
    assert set(tested.dataset("test").pairs.indices) == rows["test"]
    keys = [(epoch, row) for epoch in range(3) for row in range(10)]
    first, torch_state = train.__getitems__(keys), torch.get_rng_state()
    again = made("fit").dataset("train").__getitems__(keys[::-1])
    assert torch.equal(first.image, again.image.flip(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert not torch.equal(first.image[:10], first.image[10:20])
    assert not torch.equal(first.image, made("fit", seed=1).dataset("train").__getitems__(keys).image)
    assert fitted.transforms  # frozen layers are run in every epoch
    assert first.label.tolist() == [train.pairs.indices[row] % 2 for _, row in keys]
    with pytest.raises(UserError, match=r"refused|--data\.class_path"):
        OwnData(module.Sizeless(), "own.Sizeless", "fit")


def test_module_without_a_test_dataloader_fits_and_test_says_what_it_lacks(own, refused):
    made = run("fit", "--data.class_path", "own.Untested", *ONE)
    assert {row["split"] for row in read_csv(made / "split.csv")} == {"train", "val"}
    assert "`test_dataloader` must be implemented" in refused("test", str(made), "--trust", "own.Untested")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "own.Float",
            "own.Float: train gives tuple with float32 (3, 32, 32), not (image, label), the image uint8 (3, 32, 32)",
        ),
        ("own.Small", "uint8 (3, 16, 32), not (image, label), the image uint8 (3, 32, 32)"),
        ("own.Last", "uint8 (32, 32, 3), not (image, label)"),
        ("own.Bare", "Tensor with object (), not (image, label)"),
        ("own.Mapping", "dict with object (), not (image, label)"),
        ("own.Above", "own.Above: train has the labels [2], not an int below K for each image"),
        ("own.Negative", "train has the labels [-1]"),
        ("own.Words", "train has the labels ['dark']"),
        ("own.OneHot", "train has the labels [0. 1.]"),
        ("own.Stream", "train_dataloader gives Endless, not one DataLoader with a map-style data set"),
        ("own.Several", "train_dataloader gives list, not one DataLoader"),
        ("own.Unnamed", "own.Unnamed: class_names is None, not a list of different names; see project/data/own.py."),
        ("own.Twice", "class_names is ['dark', 'dark'], not a list of different names"),
        ("own.Sizeless", "image_size is None, not a number of pixels"),
        ("own.Shades", "--data.class_path own.Shades is no LightningDataModule"),
        ("own.Narrow", "--data.class_path own.Narrow takes no --data.augment, --data.balance"),
        ("own.Listed", "data.listing"),
        ("own.Sorce", "there is no such class; give package.module.Class. Did you mean Source?"),
        ("won.Source", "--data.class_path won.Source: there is no module won."),
        ("own.Source --data.coutn 3", "There is no option --data.coutn. Did you mean --data.count?"),
        ("own.Source --data.count x", "--data.count is x; it takes int."),
        ("own.Source --folds 2", "--folds needs the splits of ImageData, which own.Source does not have."),
        ("own.Source --model.class_path own.Raw", "--model.class_path own.Raw is no Classifier"),
        ("own.Source --model.class_path own.Closed", "own.Closed takes no --model.backbone_lr"),
    ],
)
def test_class_that_cannot_be_used_is_refused_in_a_sentence(own, refused, words, sentence):
    assert sentence in refused("fit", "--data.class_path", *words.split(), *ONE)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_subclasses_of_image_data_and_classifier_from_a_file(own, capsys, refused):
    files = sorted(Path("photos").glob("[br]*/*.png"))
    lines = [f"{file.relative_to('photos')} {number // 40} {number % 4 % 3}" for number, file in enumerate(files)]
    Path("listing.txt").write_text("\n".join(lines))
    Path("both.yaml").write_text(
        "data:\n  class_path: own.Listed\n  init_args: {listing: listing.txt, root: photos, image_size: 32}\n"
        "model: {class_path: own.Scaled, init_args: {factor: 3.0, optimizer: {class_path: torch.optim.NAdam}}}\n"
    )
    options = ["--config", "both.yaml", "--data.workers", "0", "--data.batch_size", "8"]
    made = run("fit", *options, *ONE, "--monitor", "val/quality")
    assert "--trust own.Listed --trust own.Scaled" in capsys.readouterr().out
    config = yaml.safe_load((made / "config.yaml").read_text())
    assert (config["data"]["listing"], config["model"]["factor"]) == ("listing.txt", 3.0)
    state = torch.load(made / "checkpoints" / "best.ckpt", weights_only=True)
    assert state["hyper_parameters"]["factor"] == 3.0
    assert state["metadata"]["metrics"]["val/quality"] == 0.5
    assert "names own.Scaled" in refused("test", str(made), "--trust", "own.Listed")
    trust = ["--trust", "own.Listed", "--trust", "own.Scaled"]
    run("test", str(made), *trust)
    assert len(read_csv(made / "predictions.csv")) == 20
    run("predict", str(made), "photos/red")
    run("export", str(made))
    assert "validation images of photos" in capsys.readouterr().out
    more = ["--resume", str(made), "--trainer.max_epochs", "2"]
    other = ["--model.class_path", "own.Scaled", "--model.factor", "4"]
    assert "--model.factor 3.0 -> 4.0" in refused("fit", *more, *trust, *other)
    run("fit", *options, *more)  # names the classes itself
    assert "There is no option --data.listing" in refused("fit", "--data.listing", "listing.txt")


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_tested_on_an_own_module(own, refused):
    made = run("fit", *SOURCE, *ONE)
    run("test", str(made), "--data.class_path", "own.Source", "--data.count", "40")
    assert len(read_csv(made / "predictions.csv")) == 10
    Path("listing.txt").write_text("blue/000.png 0 0\nred/000.png 1 0\nblue/001.png 0 2\nred/001.png 1 2\n")
    listed = ["--data.class_path", "own.Listed", "--data.listing", "listing.txt", "--data.root", "photos"]
    assert "the checkpoint has dark, light; the data has blue, red" in refused("test", str(made), *TRUST, *listed)


@pytest.mark.slow
def test_fit_as_a_function_takes_classes_and_their_arguments(own):
    entry = {"class_path": "own.Source", "init_args": {"count": 64, "parts": ["a/b.csv", "c"]}}
    options = dict(zip((word[2:] for word in ONE[::2]), ONE[1::2], strict=True))
    made = fit(data=entry, **options)
    assert made.test()["n"] == 16
    assert made.predict("photos/red/000.png")[0].label in ("dark", "light")
    assert yaml.safe_load((made.folder / "config.yaml").read_text())["data"]["parts"] == ["a/b.csv", "c"]


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"class_path": "evil.Net"}),
        ("data", {"net": "evil.Net"}),
        ("data", {"net": {"class_path": "evil.Net", "init_args": {}}}),
        ("data", {"init_args": {"net": "evil.Net"}}),
        ("data", {"net": "net.yaml"}),
        ("model", {"class_path": "evil.Net"}),
        ("model", {"class_path": "project.classifier.Classifier", "init_args": {"network": "evil.Net"}}),
        ("model", {"class_path": "own.Scaled"}),
    ],
)
def test_a_file_cannot_choose_what_code_runs_by_a_class_or_its_arguments(own, refused, section, change):
    made = run("fit", *SOURCE, *ONE)
    Path("net.yaml").write_text("class_path: evil.Net\n")
    config = yaml.safe_load((made / "config.yaml").read_text())
    config[section] |= change
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(made / "checkpoints" / "best.ckpt", weights_only=True)
    content["metadata"]["config"][section] |= change
    torch.save(content, "evil.ckpt")
    for words in (["test", "evil.ckpt"], ["fit", "--resume", str(made), "--trainer.max_epochs", "2"]):
        assert "names" in refused(*words, *TRUST)
    assert not Path("executed").exists()
    shutil.rmtree("runs")


def test_targets_are_the_labels_where_a_data_set_has_them(own):
    import own as module

    source = module.Source()
    source.setup("fit")
    pairs = source.splits[0]
    pairs.targets = torch.tensor([pairs[row][1] for row in range(len(pairs))])
    source.setup = lambda stage: None
    data = OwnData(source, "own.Source", "fit")
    assert np.array_equal(data.dataset("train").labels, pairs.targets)
    assert data.manifest.class_names == ["dark", "light"]
    pairs.targets = 1 - pairs.targets  # a target_transform changes the pairs alone
    assert np.array_equal(OwnData(source, "own.Source", "fit").dataset("train").labels, 1 - pairs.targets)


def test_seed_reaches_data_whose_loader_has_a_sampler_of_batches_and_each_class_needs_training_images(own):
    import own as module

    source = module.Source()
    source.train_dataloader = lambda: DataLoader(
        source.splits[0], batch_sampler=BatchSampler(SequentialSampler(source.splits[0]), 8, drop_last=False)
    )
    data = OwnData(source, "own.Source", "fit", seed=7)
    assert data.batch_size == 8
    assert data.dataset("train").seed == 7
    source.class_names = ["dark", "light", "grey"]
    with pytest.raises(UserError, match="There is no training image of grey; add some, or leave the class out"):
        OwnData(source, "own.Source", "fit").setup("fit")
