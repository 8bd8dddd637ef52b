"""Packs a checkpoint for use elsewhere: python -m project.cli export runs/digits/version_0."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from project import files, runs
from project.errors import UserError, command
from project.inference import bundle, hub
from project.inference.load import Source, locate_checkpoint


def export(
    checkpoint: str | None = None,
    /,
    quantize: Literal["int8"] | None = None,
    out: str | None = None,
    pt2: bool = False,
    calibrated: bool = False,
    data: str | None = None,
    push: str | None = None,
    trust: tuple[str, ...] = (),
) -> int:
    """Packs a checkpoint for use elsewhere, and verifies that it predicts the same there.

    The bundle is a folder with model.onnx (pixels to probabilities, for use without torch), model.safetensors and
    config.json (the PyTorch network), README.md (the model card) and SHA256SUMS. `predict` and `load` take it wherever
    they take a checkpoint. Exits with 1, and leaves nothing, if its predictions for validation images, read from their
    files, differ from the checkpoint's.

    Args:
        checkpoint: A checkpoint or a run's folder; by default the newest run's best.ckpt.
        quantize: int8: layers that compute in 8 bits, on scales taken from training images, if that costs at most 0.5
            points of accuracy on the validation images and makes the file 3 times smaller or prediction 1.5 times
            faster.
        out: The folder to make; must not exist. By default bundle in the run.
        pt2: Write model.pt2 too, for torch.export.load, which runs code from the file: for your own use.
        calibrated: Build in the temperature that `report` has found, so that probabilities match frequencies.
        data: Where the run's images are now; by default where they were.
        push: Also upload the bundle to this repository on the Hugging Face hub, user/name; a new one is public.
        trust: Class path of the checkpoint's network, if that is neither this package's nor a library's; repeatable.
    """
    file = locate_checkpoint(checkpoint)
    run = runs.folder_of(file)
    target = Path(out) if out is not None else run / "bundle"
    files.require_new(target, "out")
    from project.export import model_card, onnx, verify  # torch: only once the arguments are known to be valid
    from project.export import quantize as quantization
    from project.inference.metadata import provenance

    versions = onnx.library_versions()
    network = Source(file, False, trust).load_network(calibrated, device="cpu")
    metadata = replace(network.metadata, export={"versions": versions, "git_commit": provenance()["git_commit"]})
    images = verify.draw_images(run, "val", verify.MAX_IMAGES, metadata, data)
    samples = verify.training_samples(run, network, data) if quantize is not None else []
    try:
        with files.new_folder(target) as folder:
            program = onnx.trace(network.network, metadata.temperature, metadata.image_size)
            onnx.write_onnx(program, folder / bundle.MODEL, onnx.properties(metadata))
            onnx.write_safetensors(network.network, folder / bundle.WEIGHTS)
            if pt2:
                onnx.write_program(program, folder / bundle.PROGRAM)
            bundle.seal(folder, metadata)
            exact = bundle.OnnxPredictor(folder)
            compared, outputs = verify.compare(network, exact, images)
            metadata = replace(metadata, compared=compared)
            if samples:
                metadata = quantization.quantize(folder, metadata, exact, outputs, images, samples)
            model_card.write(folder / bundle.CARD, file, metadata)
            bundle.seal(folder, metadata)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; give another folder by --out.") from error
    size = sum(part.stat().st_size for part in target.iterdir())
    print(f"bundle: {target} ({size / 1e6:,.0f} MB, {metadata.calibration} probabilities)")
    print(f"next: {command('predict', target if push is None else hub.push(target, push))} IMAGES...")
    return 0
