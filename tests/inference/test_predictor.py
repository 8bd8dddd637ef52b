"""Reading ahead, mirror images, bytes: what all predictors have in common."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from project import load
from project.data import images
from project.inference.metadata import Metadata
from project.inference.predictor import Predictor


class Redness(Predictor):
    """How red the left half is."""

    def __init__(self):
        half = [0.5, 0.5, 0.5]
        super().__init__(Metadata("redness", ["other", "red"], 8, "stretch", half, half, {}))

    def probabilities(self, image):
        red = image[:, :, :4, 0].mean(axis=(1, 2), dtype=np.float32) / 255
        return np.stack([1 - red, red], axis=1)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_is_kept_and_unreadable_images_stay_in_it(photos, workers):
    (photos / "red" / "000.png").write_bytes(b"no image")
    paths = [*sorted(map(str, photos.rglob("*.png"))), "nowhere.png"]
    predictions = Redness().predict(paths, batch_size=7, workers=workers)
    assert [p.path for p in predictions] == paths
    assert [p.path for p in predictions if p.error] == [str(photos / "red" / "000.png"), "nowhere.png"]
    assert predictions[-1].error == "no such file or directory"
    for prediction in predictions[::10]:
        if not prediction.error:
            expected = Redness().probabilities(images.read(prediction.path, 8)[None])[0]
            assert np.allclose(prediction.probabilities, expected)


def test_bytes_are_images_too(photos):
    file = photos / "green" / "003.png"
    (by_name,), (by_bytes,) = Redness().predict([file]), Redness().predict([file.read_bytes()])
    assert by_name.probabilities == by_bytes.probabilities


def test_mirror_images_are_averaged(photos):
    file = photos / "red" / "003.png"
    pixels = images.read(file, 8)[None]
    plain, mirrored = Redness().probabilities(pixels), Redness().probabilities(pixels[:, :, ::-1])
    (prediction,) = Redness().predict([file], tta=True)
    assert np.allclose(prediction.probabilities, (plain + mirrored) / 2)
    assert not np.allclose(plain, mirrored)


def test_endless_list_is_read_a_few_batches_ahead(photos):
    read = []

    def paths():
        for number in itertools.count():
            read.append(number)
            yield photos / "red" / "001.png"

    stream = Redness().stream(paths(), batch_size=4, workers=1)
    assert len([next(stream) for _ in range(10)]) == 10
    assert len(read) <= 10 + 3 * 4
    stream.close()


def test_module_imports_no_torch():
    code = "import sys, project.inference.predictor, project.inference.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_network_computes_the_same_in_any_batch(at_trained):
    paths = sorted(map(str, Path("photos").rglob("*.png")))[::13]
    predictor = load(at_trained)
    one_by_one = [predictor.predict([path])[0] for path in paths]
    for single, batched in zip(one_by_one, predictor.predict(paths), strict=True):
        assert np.allclose(single.probabilities, batched.probabilities, atol=1e-6)
