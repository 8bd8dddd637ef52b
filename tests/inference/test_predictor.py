"""Reading ahead, mirror images, bytes: what all predictors have in common."""

import itertools

import numpy as np
import pytest

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


def test_bytes_are_images_too_and_mirror_images_are_averaged(photos):
    file = photos / "red" / "003.png"
    pixels = images.read(file, 8)[None]
    plain, mirrored = Redness().probabilities(pixels), Redness().probabilities(pixels[:, :, ::-1])
    (prediction,) = Redness().predict([file.read_bytes()])
    assert np.allclose(prediction.probabilities, plain)
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
