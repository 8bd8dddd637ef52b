"""8 bits: a model.onnx whose layers with weights compute in int8, kept only where that gains much and costs little."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from project.data.images import Pixels
from project.errors import UserError
from project.export import onnx, verify
from project.inference import bundle, timing
from project.inference.metadata import Metadata

MAX_LOSS, MIN_SMALLER, MIN_FASTER = 0.5, 3.0, 1.5  # points of accuracy it may lose; times smaller or faster


def write_int8(source: Path, file: Path, properties: dict[str, str], samples: Iterable[Pixels]) -> None:
    """Writes a model whose layers with weights compute in 8 bits, on scales taken from sample images.

    Scales are static, so that an image's result does not depend on the rest of its batch. Weights have a scale per
    channel and 7 bits, so that sums of products fit into the 16 bits that some processors accumulate in, and accuracy
    is the same on all. Linear layers keep their outputs in 32 bits: quantisation steps would show in the
    probabilities. So do attention's matrix products, which have no weights. Samples are arrays (B, H, W, 3) uint8, RGB.
    UserError where the quantiser cannot handle the network.
    """
    import onnx as library
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        remaining = ({"image": batch} for batch in samples)

        def get_next(self) -> dict[str, Pixels] | None:
            return next(self.remaining, None)

    model, linear = library.load(source), ["Gemm", "MatMul"]
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type in linear and not weights & set(node.input)]
    # the exporter has inferred shapes and folded constants; without this entry the quantiser warns that nobody did
    model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    try:
        quantize_static(
            model,
            file,
            Samples(),
            op_types_to_quantize=["Conv", "Relu", "Clip", *linear],  # with Relu: a scale covers what a ReLU leaves
            nodes_to_exclude=products,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={
                "CalibMovingAverage": True,  # mean extremes over batches: an outlier stretches the scales less
                "OpTypesToExcludeOutputQuantization": linear,
            },
        )
    except OSError:
        raise
    except Exception as error:  # the quantiser raises many types where it does not know a graph
        raise UserError(f"ONNX Runtime cannot compute the network in 8 bits: {onnx.first_line(error)}") from error
    onnx.save(library.load(file), file, properties)


def quantize(
    folder: Path,
    metadata: Metadata,
    exact: bundle.OnnxPredictor,
    expected: verify.Outputs,
    images: verify.LabelledImages,
    samples: list[Pixels],
) -> Metadata:
    """Replaces a bundle's model.onnx by one in 8 bits where that is worth it, and prints what was measured.

    `exact` is the bundle in `folder`, loaded; `expected` are the checkpoint's outputs for the images; `samples` as for
    `write_int8`. Returns the metadata with its new `precision` and `int8`.
    """
    model, trial, reduced = folder / bundle.MODEL, folder / "int8", replace(metadata, precision="int8")
    trial.mkdir()
    try:
        write_int8(model, trial / bundle.MODEL, onnx.properties(reduced), samples)
        bundle.seal(trial, reduced)
        candidate = bundle.OnnxPredictor(trial)
        outputs = verify.predict(candidate, images, batch_size=64)
    except UserError as error:
        shutil.rmtree(trial)
        print(f"int8: {error}; model.onnx stays float32")
        return metadata
    accuracy = expected.accuracy, outputs.accuracy
    difference = float(np.abs(expected.probabilities - outputs.probabilities).max())
    sizes = [file.stat().st_size for file in (model, trial / bundle.MODEL)]
    image = np.zeros((1, exact.image_size, exact.image_size, 3), np.uint8)
    seconds = timing.side_by_side(lambda: exact.probabilities(image), lambda: candidate.probabilities(image))
    lost, smaller, faster = 100 * (accuracy[0] - accuracy[1]), sizes[0] / sizes[1], seconds[0] / seconds[1]
    kept = round(lost, 6) <= MAX_LOSS and (smaller >= MIN_SMALLER or faster >= MIN_FASTER)
    print(
        f"int8: accuracy {accuracy[0]:.2%} becomes {accuracy[1]:.2%}, probabilities differ by at most "
        f"{difference:.2g}, {sizes[0] / 1e6:,.1f} MB become {sizes[1] / 1e6:,.1f} ({smaller:.1f} x smaller), "
        f"{1e3 * seconds[0]:.1f} ms an image become {1e3 * seconds[1]:.1f} ({faster:.1f} x as fast): "
        f"{'kept' if kept else 'not worth it, model.onnx stays float32'}"
    )
    if kept:
        (trial / bundle.MODEL).replace(model)
    shutil.rmtree(trial)
    pairs = {"accuracy": accuracy, "bytes": sizes, "seconds_a_picture": seconds}
    measured = {name: dict(zip(("float32", "int8"), pair, strict=True)) for name, pair in pairs.items()}
    return replace(reduced if kept else metadata, int8={"kept": kept, "largest_difference": difference, **measured})
