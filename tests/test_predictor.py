"""Reading ahead, mirror images, bytes: what every predictor does alike."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from project import load
from project.data import images
from project.predictor import Predictor


class Redness(Predictor):
    """How red the left half is."""

    class_names, image_size, resize = ["other", "red"], 8, "stretch"

    def probabilities(self, image):
        red = image[:, :, :4, 0].mean(axis=(1, 2), dtype=np.float32) / 255
        return np.stack([1 - red, red], axis=1)


@pytest.mark.parametrize("workers", [1, 3])
def test_pictures_come_back_in_order_and_unreadable_ones_in_their_place(photos, workers):
    (photos / "red" / "000.png").write_bytes(b"no picture")
    paths = sorted(map(str, photos.rglob("*.png")))
    made = Redness().predict(paths, batch_size=7, workers=workers)
    assert [p.path for p in made] == paths
    assert [p.path for p in made if p.error] == [str(photos / "red" / "000.png")]
    for prediction in made[::10]:
        if not prediction.error:
            expected = Redness().probabilities(images.read(prediction.path, 8)[None])[0]
            assert np.allclose(prediction.probabilities, expected)


def test_bytes_are_pictures_too(photos):
    file = photos / "green" / "003.png"
    (by_name,), (by_bytes,) = Redness().predict([file]), Redness().predict([file.read_bytes()])
    assert by_name.probabilities == by_bytes.probabilities


def test_mirror_images_are_averaged(photos):
    file = photos / "red" / "003.png"
    pixels = images.read(file, 8)[None]
    expected = (Redness().probabilities(pixels) + Redness().probabilities(pixels[:, :, ::-1])) / 2
    (made,) = Redness().predict([file], tta=True)
    assert np.allclose(made.probabilities, expected)
    assert not np.allclose(made.probabilities, Redness().probabilities(pixels))


def test_endless_list_is_read_a_few_batches_ahead(photos):
    asked = []

    def paths():
        for number in itertools.count():
            asked.append(number)
            yield photos / "red" / "001.png"

    stream = Redness().stream(paths(), batch_size=4, workers=1)
    assert len([next(stream) for _ in range(10)]) == 10
    assert len(asked) <= 10 + 3 * 4
    stream.close()


def test_class_is_ready_without_torch():
    code = "import sys, project.predictor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_network_answers_as_the_batch_of_one(at_trained):
    paths = sorted(map(str, Path("photos").rglob("*.png")))[::13]
    predictor = load(at_trained)
    one_by_one = [predictor.predict([path])[0] for path in paths]
    for single, batched in zip(one_by_one, predictor.predict(paths), strict=True):
        assert np.allclose(single.probabilities, batched.probabilities, atol=1e-6)
