"""The model that is served: a bundle or a checkpoint, its identity, and its heat maps."""

import importlib.util
import io
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from project.data import images
from project.data.images import Pixels
from project.errors import UserError
from project.evaluation import attribution
from project.inference import bundle, calibration
from project.inference.load import locate

if TYPE_CHECKING:
    from project.inference.checkpoint import TorchPredictor


class Model:
    """A trained classifier, its `predictor`, and its `id`, the network's name and a checksum of its weights.

    `unexplained` is the reason why there are no heat maps, or None; `parallel` batches share the threads. UserError
    where the path is no usable model, or a checkpoint shall compute several batches at once.
    """

    def __init__(
        self, path: str, calibrated: bool, threads: int, parallel: int = 1, trust: Collection[str] = ()
    ) -> None:
        self._source, self._threads, self._lock = locate(path, trust), threads, threading.Lock()
        if parallel > 1 and not self._source.is_bundle:  # heat maps hang hooks into the same network
            raise UserError(f"--parallel is {parallel}, but a checkpoint computes one batch at a time; export it.")
        self.predictor = self._source.load(calibrated, threads=max(1, threads // parallel))
        self._network = None if self._source.is_bundle else cast("TorchPredictor", self.predictor)
        needed = ["torch", "captum"]
        if self._source.is_bundle:
            sums = (self._source.file / bundle.SUMS).read_text(encoding="utf-8").splitlines()
            checksum = next(line[:12] for line in sums if line.endswith(f"  {bundle.MODEL}"))
            needed.append("safetensors")
        else:
            checksum = calibration.fingerprint(self._source.file)
        self.id = f"{self.predictor.metadata.model}-{checksum}"
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        self.unexplained = f"This server has no {missing[0]}, which heat maps need." if missing else None
        size = self.predictor.image_size
        self.predictor.probabilities(np.zeros((1, size, size, 3), np.uint8))  # fails now or never

    def read(self, image: bytes) -> Pixels:
        """Decodes an image for the network, (H, W, 3)."""
        images.require_short_decoding(image)
        return images.read(image, self.predictor.image_size, self.predictor.resize)

    def network(self) -> "TorchPredictor":
        """PyTorch's network; a bundle's is loaded on first use, which takes seconds."""
        with self._lock:
            self._network = self._network or self._source.load_network(threads=self._threads)
            return self._network

    def explanation(self, image: bytes, target: int | None) -> bytes:
        """A PNG of the image with the evidence for a class, given by its index; by default the predicted class.

        ImageError where the image cannot be read, UserError where the network has no maps that Grad-CAM could use.
        """
        from project.evaluation import figures

        pixels, network = self.read(image), self.network()
        index = int(self.predictor.probabilities(pixels[None]).argmax()) if target is None else target
        with self._lock:  # Captum hangs hooks into the network
            (heat,), _ = attribution.heat_maps(network, pixels[None], [index])
        stream = io.BytesIO()
        Image.fromarray(figures.overlay(pixels, heat)).save(stream, "PNG")
        return stream.getvalue()
