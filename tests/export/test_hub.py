"""Bundles go to a hub and come back: against a server on this machine that answers as the Hugging Face hub does."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from project import cli, load
from project.errors import UserError
from project.evaluation import results
from project.export import verify
from project.inference import hub
from project.inference.load import locate
from project.serving.model import Model
from tests.conftest import COLOURS, make_images, read_csv
from tests.export.hub_server import TOKEN, Hub

CONTRACTS = Path(__file__).parents[1] / "contracts"
BUNDLE = CONTRACTS / "run" / "bundle"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>'")  # the library's own use of its HTTP library
PHOTOS = sorted(map(str, (CONTRACTS / "photos").rglob("*.png")))[::10]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub, whose address and token the library has, with an empty cache."""
    server = Hub()
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in {  # what the library reads from the environment when it is imported
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.stop()


@pytest.fixture
def pushed(server):
    """The hub with a bundle in user/photos."""
    server.commit("user/photos", contents())
    return server


def contents(folder=BUNDLE):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def probabilities(predictor):
    return np.array([prediction.probabilities for prediction in predictor.predict(PHOTOS)])


@pytest.mark.parametrize("in_commit", [False, True])
def test_pushed_bundle_predicts_the_same_from_the_hub_and_without_it_from_the_cache(server, monkeypatch, in_commit):
    server.in_commit = in_commit
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not in_commit)  # the library uploads otherwise
    assert hub.push(BUNDLE, "user/photos") == "hf://user/photos"
    ((_, files),) = server.commits["user/photos"]
    assert files == contents()
    assert bool(server.objects) != in_commit

    expected = probabilities(load(BUNDLE))
    assert (probabilities(load("hf://user/photos")) == expected).all()
    assert (probabilities(load(Path("hf://user/photos"))) == expected).all()
    server.stop()
    asked = len(server.requests)
    again = load("hf://user/photos")
    assert (probabilities(again) == expected).all()
    assert len(server.requests) == asked


@pytest.mark.slow
def test_heat_maps_and_the_server_take_a_bundle_from_the_hub(pushed):
    served = Model("hf://user/photos", False, threads=1)
    assert served.id == Model(str(BUNDLE), False, threads=1).id
    assert np.allclose(probabilities(served.network()), probabilities(served.predictor), atol=1e-5)


def test_neither_code_nor_other_files_are_downloaded_and_the_card_may_be_edited_there(pushed):
    edited = {"README.md": b"---\nlicense: mit\n---\n", "model.pt2": b"code", "a/b.py": b"code", "big.bin": b"x" * 99}
    pushed.commit("user/photos", edited)
    folder = locate("hf://user/photos").file
    assert {file.name for file in folder.iterdir()} == {*contents()} - {"README.md"}
    assert load("hf://user/photos").class_names == ["blue", "green", "red"]


def test_revision_is_the_one_that_is_named_and_a_push_is_a_commit_beside_other_files(pushed):
    first = pushed.commit("user/photos", {"LICENSE": b"MIT", "model.onnx": b"older"})
    hub.push(BUNDLE, "user/photos")
    assert len(pushed.commits["user/photos"]) == 3
    assert pushed.commits["user/photos"][-1][1] == contents() | {"LICENSE": b"MIT"}
    assert load("hf://user/photos@main").class_names == ["blue", "green", "red"]
    with pytest.raises(UserError, match=r"model\.onnx is damaged"):
        load(f"hf://user/photos@{first}")


def test_repository_without_a_bundle_is_refused_before_its_weights_are_downloaded(server):
    server.commit("user/other", {"model.safetensors": b"x" * 99_999, "config.json": b"{}"})
    with pytest.raises(UserError, match=r"^hf://user/other cannot be loaded: .* has no SHA256SUMS"):
        load("hf://user/other")
    assert not any("model.safetensors" in request for request in server.requests)


def test_repository_that_cannot_be_loaded_is_told_in_a_sentence(pushed, monkeypatch, refused):
    def message(address):
        return refused("predict", address, *PHOTOS)

    pushed.private.add("user/secret")
    pushed.commit("user/secret", contents())
    assert load("hf://user/secret").class_names
    for address, reason in (
        ("hf://user/none", "no such repository, or no permission; check the name, or log in by `hf auth login`"),
        ("hf://user/photos@v9", "no such branch, tag or commit"),
        ("hf://user/a/b", "the name of a repository is user/name"),
        ("hf://", "the name of a repository is user/name"),
    ):
        told = message(address)
        assert told.startswith(f"{address} cannot be loaded: ")
        assert reason in told
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-2")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "or no permission" in message("hf://user/secret")
    monkeypatch.delenv("HF_TOKEN")
    assert "or no permission" in message("hf://user/secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else the library tries again for half a minute
    assert "cannot be loaded: the hub cannot be reached" in message("hf://user/photos")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "without the library huggingface_hub; install it: pip install -e .[hub]" in message("hf://user/photos")


def test_push_that_fails_is_told_in_a_sentence_with_the_command_that_uploads_the_bundle(server, monkeypatch):
    def message(name):
        with pytest.raises(UserError) as raised:
            hub.push(BUNDLE, name)
        told = re.fullmatch(r"(.+) is complete, but not on the hub \(`(.+)` tries again\)(.+)", str(raised.value))
        assert told is not None
        assert (told[1], shlex.split(told[2])) == (str(BUNDLE), ["hf", "upload", name, str(BUNDLE)])
        return told[3]

    for name, reason in (("user/a b", "the name of a repository"), ("else/photos", "You don't have the rights")):
        assert reason in message(name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "log in by `hf auth login`" in message("user/photos")
    monkeypatch.delenv("HF_TOKEN")
    assert "log in by `hf auth login`" in message("user/photos")
    server.stop()
    assert "the hub cannot be reached" in message("user/photos")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "without the library huggingface_hub" in message("user/photos")
    assert server.commits == {}


@pytest.fixture
def run(workplace):
    """A tested run, and its images where it had them."""
    run = shutil.copytree(CONTRACTS / "run", "runs/photos/version_0", ignore=shutil.ignore_patterns("bundle"))
    make_images(workplace / "photos", dict.fromkeys(COLOURS, 24))  # contracts/ holds some of them
    Path(run, "predictions.csv").touch()  # after the checkpoint, which git does not remember
    return Path(run)


@pytest.mark.slow
def test_documented_commands_export_and_push_what_is_verified_and_predict_without_torch(run, server, monkeypatch):
    page = (CONTRACTS.parents[1] / "docs" / "export.md").read_text(encoding="utf-8").partition("## Model hub")[2]
    export, predict = (
        shlex.split(line)[1:] for line in re.findall(r"^    (python -m project\.cli .*)", page, re.MULTILINE)
    )
    Path("DIR").symlink_to("photos")
    Path("runs/latest").symlink_to("photos/version_0")
    compare, asked = verify.compare, []
    monkeypatch.setattr(verify, "compare", lambda *words: asked.extend(server.requests) or compare(*words))
    assert cli.main(export[2:]) == 0
    assert asked == []
    ((_, files),) = server.commits["user/name"]
    assert files == contents(Path("shared"))
    assert_card_has_metadata(files["README.md"].decode(), run)

    Path("without/torch").mkdir(parents=True)
    Path("without/torch/__init__.py").write_text("raise ImportError")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": os.pathsep.join(("without", environment["PYTHONPATH"])), "HF_HOME": "home"}
    environment |= {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, *predict], env=environment, check=True)
    rows = read_csv("predictions.csv")
    assert len(rows) == 72
    assert all(Path(row["path"]).parent.name == row["label"] for row in rows)


def assert_card_has_metadata(text, run):
    card = huggingface_hub.ModelCard(text).data
    assert (card.library_name, card.pipeline_tag, card.license) == ("onnx", "image-classification", None)
    assert (card.eval_results[0].dataset_name, card.eval_results[0].dataset_split) == ("photos", "test")
    measured = {each.metric_type: each.metric_value for each in card.eval_results}
    scores = results.TestPredictions.read(run / "predictions.csv").scored(None).scores()
    names = {"auroc": "roc_auc", "brier": "brier_score"}  # the hub's
    assert measured == {names.get(name, name): round(value, 4) for name, value in scores.items()}
