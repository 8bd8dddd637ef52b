"""A bundle behind LitServe, Lightning's own server: benchmarks.litserve BUNDLE --port PORT WORKERS THREADS."""

import sys
from pathlib import Path
from typing import Any

import litserve
from fastapi import Request

from project.data import images
from project.data.images import Pixels
from project.inference.bundle import OnnxPredictor


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """Reads one image after the other and computes them in batches."""

    def __init__(self, bundle: str, threads: int) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.005, api_path="/predict")
        self._bundle, self._threads = bundle, threads

    def setup(self, device: str) -> None:
        self._network = OnnxPredictor(Path(self._bundle), self._threads)

    def decode_request(self, request: Request) -> Pixels:
        form: Any = request  # LitServe gives the form because of the annotation
        return images.read(form["images"].file.read(), self._network.image_size, self._network.resize)

    def predict(self, x: Pixels) -> Any:
        return self._network.probabilities(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"label": self._network.class_names[int(output.argmax())], "probabilities": output.tolist()}


if __name__ == "__main__":
    folder, port, workers, threads = sys.argv[1], *map(int, sys.argv[3:])
    server = litserve.LitServer(Classifier(folder, threads), accelerator="cpu", workers_per_device=workers)
    server.run("127.0.0.1", port, log_level="error", generate_client_file=False)
