"""What a trained network must say of itself, in a checkpoint or a bundle; torch is not needed here."""

import math
from collections.abc import Callable
from typing import Any, get_args

from project.data import images

LARGEST = 16_384  # side of a picture, in pixels: a foreign file must not decide how much memory is taken


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(n, float) and math.isfinite(n) for n in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(n, str) and _is_text(n) for n in value)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")  # folders may have names that are not UTF-8
    except UnicodeEncodeError:
        return False
    return True


def _configuration(value: Any) -> bool:
    if not isinstance(value, dict) or not all(
        isinstance(value.get(name), dict) for name in ("data", "model", "trainer")
    ):
        return False
    data = value["data"]
    texts, numbers = ("root", "split", "group", "exclude"), ("split_seed", "folds", "fold")
    return all(isinstance(data.get(name), str | None) for name in texts) and all(
        isinstance(data.get(name), int | None) for name in numbers
    )


# a test, and the words for it
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a name"),
    "class_names": (lambda value: _names(value) and len(set(value)) == len(value), "a list of different names"),
    "image_size": (lambda value: type(value) is int and 0 < value <= LARGEST, f"a number of pixels up to {LARGEST}"),
    "resize": (
        lambda value: isinstance(value, str) and value in get_args(images.Resize),
        f"one of {', '.join(get_args(images.Resize))}",
    ),
    "mean": (_numbers, "three numbers"),
    "std": (lambda value: _numbers(value) and all(n > 0 for n in value), "three numbers above 0"),
    "config": (_configuration, "a configuration"),
    "versions": (lambda value: isinstance(value, dict | None), "numbers by name"),
}
# what a bundle must say besides
OF_BUNDLES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: isinstance(value, float) and 0.01 < value < 100, "a number from 0.01 to 100"),
    "calibrated": (lambda value: isinstance(value, bool), "true or false"),
}


def fault(metadata: dict[str, Any], table: dict[str, tuple[Callable[[Any], bool], str]] = EXPECTED) -> str | None:
    """What is wrong with it, as "its image_size is not ..."; None where nothing is."""
    for key, (is_right, expected) in table.items():
        if not is_right(metadata.get(key)):
            return f"its {key} is not {expected}"
    return None
