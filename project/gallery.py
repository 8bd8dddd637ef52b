"""Pictures worth a look: those that are wrong and sure of it, and those that are hardly decided."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project import figures, page, scores
from project.data import images
from project.predictor import Predictor
from project.results import Results

SHOWN = 12


def content(found: Results, predictor: Predictor) -> dict[str, Any]:
    """What the template shows: `worst`, `unsure`, and sentences about them."""
    sample = found.test.sample(found.positive)
    worst, unsure = worst_errors(sample), least_certain(sample)
    shown = {place: picture for place in {*worst, *unsure} if (picture := _read(found, place, predictor)) is not None}
    heat, reason = _heat_maps(shown, sample, predictor, found.checkpoint)

    def items(places: Sequence[int]) -> list[dict[str, Any]]:
        return [_item(found, sample, place, shown[place], heat.get(place)) for place in places if place in shown]

    none_left = "No test picture is wrong." if not worst else "The test pictures are not there any more."
    return {"worst": items(worst), "unsure": items(unsure), "no_worst": none_left, "heat_text": reason}


def worst_errors(sample: scores.Sample, count: int = SHOWN) -> list[int]:
    """Places of the wrong answers, the surest first."""
    said = sample.probabilities[np.arange(len(sample.true)), sample.predicted]
    order = np.argsort(-said, kind="stable")
    return [int(place) for place in order if sample.predicted[place] != sample.true[place]][:count]


def least_certain(sample: scores.Sample, count: int = SHOWN) -> list[int]:
    """Places of the pictures whose two likeliest classes are closest."""
    top = np.sort(sample.probabilities, axis=1)[:, -2:]
    return [int(place) for place in np.argsort(top[:, 1] - top[:, 0], kind="stable")[:count]]


def _read(found: Results, place: int, predictor: Predictor) -> images.Pixels | None:
    try:
        return images.read(found.test.paths[place], predictor.image_size, predictor.resize)
    except images.ImageError:
        return None


def _heat_maps(
    shown: dict[int, images.Pixels], sample: scores.Sample, predictor: Predictor, source: Path
) -> tuple[dict[int, images.Pixels], str]:
    """For each place the picture with its heat map laid over it, and what to say of it.

    Args:
        shown: Pictures by place.
        sample: What was answered.
        predictor: What answered.
        source: The checkpoint or bundle that it is from.
    """
    from project import attribution

    if not shown:
        return {}, ""
    if not attribution.is_available():
        return {}, " With pip install -e .[explain] a heat map of what speaks for the answer stands beside each."
    import torch

    from project.checkpoint import Network, load
    from project.errors import UserError

    places = list(shown)
    stacked = torch.from_numpy(np.stack([shown[place] for place in places])).permute(0, 3, 1, 2)
    try:
        network = predictor if isinstance(predictor, Network) else load(source, device="cpu")  # a bundle's weights
        maps = attribution.heat_maps(network, stacked, [int(sample.predicted[place]) for place in places])
    except UserError as error:  # a network that has no map for this, a bundle without its weights
        return {}, f" {error}"
    overlaid = {place: figures.overlay(shown[place], heat) for place, heat in zip(places, maps, strict=True)}
    return overlaid, " Beside each, what speaks for the answer (Grad-CAM)."


def _item(
    found: Results,
    sample: scores.Sample,
    place: int,
    picture: images.Pixels,
    heat: npt.NDArray[np.uint8] | None,
) -> dict[str, Any]:
    names, true, said = found.test.class_names, int(sample.true[place]), int(sample.predicted[place])
    return {
        "path": found.test.paths[place],
        "picture": page.picture(picture),
        "heat": None if heat is None else page.picture(heat),
        "true": names[true],
        "label": names[said],
        "right": true == said,
        "true_probability": f"{sample.probabilities[place, true]:.3f}",
        "probability": f"{sample.probabilities[place, said]:.3f}",
    }
