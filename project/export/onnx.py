"""A PyTorch network becomes files for other programs: ONNX, safetensors and torch.export's own format."""

import importlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project.errors import UserError
from project.inference import bundle
from project.inference.metadata import Metadata

LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "safetensors")
MAX_BYTES = 2_000_000_000  # of weights: an ONNX file without external data holds at most 2 GiB


class ExportModule(nn.Module):
    """A network (B, 3, H, W) uint8 to logits (B, K), their division by the temperature, and softmax."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""
        logits: Tensor = self.network(image.permute(0, 3, 1, 2)).float()
        return (logits / self.temperature).softmax(dim=1)


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that make a bundle; without the extra `export`, raises UserError."""
    try:  # the modules' own versions: onnxruntime is several packages in the index
        return {name: str(importlib.import_module(name).__version__) for name in ("torch", *LIBRARIES)}
    except ImportError as error:
        raise UserError(f"export needs {error.name}; install it: pip install -e .[export]") from error


def trace(network: nn.Module, temperature: float, image_size: int) -> torch.export.ExportedProgram:
    """Returns the graph from pixels to probabilities, for batches of any size.

    UserError where the network depends on its input in a way that no graph can express, or is too large.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(f"The network has {size / 1e9:.1f} GB of weights; an ONNX file holds at most 2.")
    # weights in the usual memory order, which the file formats use
    module = ExportModule(network.to(memory_format=torch.contiguous_format), temperature).eval()
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)  # a batch of 1 would become a constant
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes={"image": {0: batch}})
    except Exception as error:  # the tracer raises the network's own exceptions, and many of its own
        raise UserError(f"torch.export cannot make a graph of the network: {first_line(error)}") from error


def write_onnx(program: torch.export.ExportedProgram, file: Path, properties: dict[str, str]) -> None:
    """Writes a graph as ONNX, with texts by key; for an operation that ONNX does not have, raises UserError."""
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes={"image": {0: "batch"}},
            input_names=["image"],
            output_names=["probabilities"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error  # which names the operation
        raise UserError(f"ONNX cannot express an operation of the network: {first_line(cause)}") from error
    assert exported is not None
    save(exported.model_proto, file, properties)


def save(model: Any, file: Path, properties: dict[str, str]) -> None:
    """Writes an ONNX model without the exporter's notes on each layer, such as paths of this machine's sources."""
    import onnx

    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, file)


def write_safetensors(network: nn.Module, file: Path) -> None:
    """Writes the weights under the names of the network's state dict."""
    from safetensors.torch import save

    # clones: the format refuses tensors that share memory
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in network.state_dict().items()}
    file.write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file has an exception of its own for a full disk


def write_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes a graph for torch.export.load, which runs code from such a file; this project never reads it back."""
    content = io.BytesIO()  # as above
    torch.export.save(program, content)
    file.write_bytes(content.getvalue())


def properties(metadata: Metadata) -> dict[str, str]:
    """Returns the texts that a model.onnx holds about itself."""
    return {
        **bundle.properties(metadata),
        "model": metadata.model,
        "temperature": repr(metadata.temperature),
        "precision": metadata.precision,
        "git_commit": metadata.git_commit,
    }


def first_line(error: BaseException) -> str:
    """The first line of an error message; without a message, the error's type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
