"""A network of PyTorch becomes files that others read: ONNX, in 32 or 8 bits, and safetensors."""

import importlib.util
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from project import bundle
from project.data.images import Pixels
from project.errors import UserError

LIBRARIES = ("onnx", "onnxruntime", "onnxscript", "safetensors")
LARGEST = 2_000_000_000  # bytes of weights: an ONNX file without others beside it is at most 2 GiB


class Whole(nn.Module):
    """From pixels to probabilities.

    Args:
        network: (B, 3, H, W) uint8 to logits (B, K).
        temperature: What the logits are divided by.
    """

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (B, H, W, 3) uint8, RGB, to probabilities (B, K)."""
        logits: Tensor = self.network(image.permute(0, 3, 1, 2)).float()
        return (logits / self.temperature).softmax(dim=1)


def require_libraries() -> None:
    """Checks that the extra `export` is installed.

    Raises:
        UserError: It is not.
    """
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UserError(f"export needs {', '.join(missing)}; install what it needs: pip install -e .[export]")


def traced(network: nn.Module, temperature: float, image_size: int) -> torch.export.ExportedProgram:
    """The network as a graph, from pixels to probabilities, for batches of any size.

    Raises:
        UserError: It cannot be exported: it does something with its input that is no graph, or it is too large.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise UserError(f"The network has {size / 1e9:.1f} GB of weights; an ONNX file holds at most 2.")
    # weights in the usual order of memory, as the formats to come have them
    whole = Whole(network.to(memory_format=torch.contiguous_format), temperature).eval()
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)  # a batch of one would stay one
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            return torch.export.export(whole, (example,), dynamic_shapes={"image": {0: batch}})
    except Exception as error:  # the tracer raises what the network's own code raises, and many kinds of its own
        raise UserError(f"torch.export cannot make a graph of the network: {_first_line(error)}") from error


def write_onnx(program: torch.export.ExportedProgram, file: Path, metadata: dict[str, str]) -> None:
    """Writes a graph as ONNX.

    Args:
        program: As `traced` makes it.
        file: Where.
        metadata: Texts by key.

    Raises:
        UserError: The network does something that ONNX has no word for.
    """
    shapes = {"image": {0: "batch"}}
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["image"],
            output_names=["probabilities"],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"ONNX has no equal of what the network does: {_first_line(cause)}") from error
    assert made is not None
    _save(made.model_proto, file, metadata)


def write_int8(source: Path, file: Path, metadata: dict[str, str], samples: Iterable[Pixels]) -> None:
    """Writes a model whose layers of weights compute in 8 bits, on scales that pictures have shown.

    Scales are fixed, so that what a picture gets does not depend on the others of its batch. Weights have a scale a
    channel and one bit less: so the sums of products fit into the 16 bits that some processors have for them, and
    accuracy is the same on all. Linear layers give their sums in 32 bits: the steps of a scale would show in the
    probabilities. So do the products of attention, which have no weights.

    Args:
        source: A model in 32 bits.
        file: Where.
        metadata: Texts by key.
        samples: Arrays (B, H, W, 3) uint8, RGB, of pictures like those to come.

    Raises:
        UserError: The quantizer does not know what to do with the network.
        OSError: There is no room for the file, or for the quantizer's own in the temporary folder.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        rest = ({"image": image} for image in samples)

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self.rest, None)

    model, linear = onnx.load(source), ["Gemm", "MatMul"]
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type in linear and not weights & set(node.input)]
    # shapes are known and constants folded since it was exported; the quantizer warns where it does not read so
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    try:
        quantize_static(
            model,
            file,
            Samples(),
            op_types_to_quantize=["Conv", "Relu", "Clip", *linear],  # so a scale is of what is left after a ReLU
            nodes_to_exclude=products,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={
                "CalibMovingAverage": True,  # mean extremes of the batches: a strange picture stretches scales less
                "OpTypesToExcludeOutputQuantization": linear,
            },
        )
    except OSError as error:
        place = tempfile.gettempdir()
        raise OSError(error.errno, f"{error.strerror} (8 bits need room in {place}, too)") from error
    except Exception as error:  # the quantizer raises many kinds where a graph is strange to it
        raise UserError(f"ONNX Runtime cannot compute the network in 8 bits: {_first_line(error)}") from error
    _save(onnx.load(file), file, metadata)


def write_safetensors(network: nn.Module, file: Path) -> None:
    """Writes the weights, by the names of the network's state dict."""
    from safetensors.torch import save

    # copies: the format has no two names for one memory
    tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in network.state_dict().items()}
    file.write_bytes(save(tensors, metadata={"format": "pt"}))  # not save_file, which has its own error for a full disk


def write_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes a graph for torch.export.load, which runs code from such a file: never read back here."""
    content = io.BytesIO()  # as above
    torch.export.save(program, content)
    file.write_bytes(content.getvalue())


def described(metadata: dict[str, Any], temperature: float, precision: str) -> dict[str, str]:
    """What a model.onnx says of itself."""
    return {
        "preprocess": json.dumps(bundle.preprocess(metadata)),
        "class_names": json.dumps(metadata["class_names"]),
        "model": metadata["model"],
        "temperature": repr(temperature),
        "precision": precision,
        "git_commit": str(metadata.get("git_commit", "")),
    }


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _save(model: Any, file: Path, metadata: dict[str, str]) -> None:
    """Without what the exporter notes of every layer, such as the paths of this machine's sources."""
    import onnx

    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)
