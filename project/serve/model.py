"""What is served: a bundle or a checkpoint, its name, and what draws heat maps where that can be had."""

import importlib.util
import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from project import attribution, bundle, calibration, runs
from project.data import images
from project.data.images import Pixels
from project.errors import UserError
from project.predictor import Predictor, load

if TYPE_CHECKING:
    from project.checkpoint import Network


class Model:
    """A trained classifier and its identity.

    Args:
        path: A bundle, a checkpoint or a run's folder.
        calibrated: As `predictor.load`.
        threads: That it computes with.
        parallel: Batches that share them.

    Attributes:
        predictor: From pixels to probabilities.
        id: The network's name and what tells its weights from others.
        unexplained: Why there are no heat maps; None where there are.

    Raises:
        UserError: It cannot be used.
    """

    def __init__(self, path: str, calibrated: bool, threads: int, parallel: int = 1) -> None:
        self._path, self._threads = path, threads
        self._network: Network | None = None
        self._loading, self._explaining = threading.Lock(), threading.Lock()
        self.predictor: Predictor
        if bundle.is_bundle(path):
            self.predictor = bundle.Bundle(path, max(1, threads // parallel))
            if calibrated:
                bundle.require_calibrated(Path(path), self.predictor.metadata)
            mark = _listed(Path(path) / bundle.SUMS, bundle.MODEL)[:12]
        else:
            if parallel > 1:  # heat maps hang hooks into the same network
                raise UserError(f"--parallel is {parallel}, but a checkpoint computes one batch at a time; export it.")
            self.predictor = load(path, calibrated)
            _use_threads(threads)
            mark = calibration.fingerprint(runs.find(path))
        self.id = f"{self.predictor.metadata['model']}-{mark}"
        self.unexplained = self._why_not()
        size = self.predictor.image_size
        self.predictor.probabilities(np.zeros((1, size, size, 3), np.uint8))  # what fails shall fail now

    def read(self, picture: bytes) -> Pixels:
        """A picture as the network sees it, (H, W, 3)."""
        return images.read(picture, self.predictor.image_size, self.predictor.resize)

    def network(self) -> "Network":
        """PyTorch's network; a bundle's is read when it is first asked for, which takes seconds."""
        from project.checkpoint import Network
        from project.checkpoint import load as load_network

        if isinstance(self.predictor, Network):
            return self.predictor
        with self._loading:
            if self._network is None:
                self._network = load_network(self._path)
                _use_threads(self._threads)
            return self._network

    def explanation(self, picture: bytes, target: int | None) -> bytes:
        """A PNG of the picture with what speaks for a class, given by its place; by default the likeliest.

        Raises:
            ImageError: The picture cannot be read.
            UserError: The network has no maps that Grad-CAM could use.
        """
        import torch

        from project import figures

        pixels = self.read(picture)
        index = target if target is not None else int(self.predictor.probabilities(pixels[None]).argmax())
        image = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
        network = self.network()
        with self._explaining:  # it hangs hooks into the network
            heat = attribution.heat_maps(network, image, [index])[0]
        stream = io.BytesIO()
        Image.fromarray(figures.overlay(pixels, heat)).save(stream, "PNG")
        return stream.getvalue()

    def _why_not(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "This server has no torch, which heat maps need."
        if not attribution.is_available():
            return "This server has no captum, which heat maps need: pip install -e .[explain]"
        if isinstance(self.predictor, bundle.Bundle):
            if not (Path(self._path) / bundle.WEIGHTS).is_file():
                return f"The bundle that is served here has no {bundle.WEIGHTS}, which heat maps need."
            if importlib.util.find_spec("safetensors") is None:
                return "This server has no safetensors, which heat maps of a bundle need: pip install -e .[export]"
        return None


def _listed(sums: Path, name: str) -> str:
    lines = (line.split("  ") for line in sums.read_text(encoding="utf-8").splitlines())
    return next(checksum for checksum, listed in lines if listed == name)


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
