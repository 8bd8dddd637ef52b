"""Writes a page on how good a classifier is: python -m project.cli report runs/digits/version_0."""

from pathlib import Path

from jsonargparse.typing import OpenUnitInterval

from project import files
from project.errors import UserError, command
from project.evaluation import report as page
from project.evaluation import results
from project.evaluation.comparison import ComparedRun
from project.inference.load import locate


def report(
    checkpoint: str | None = None,
    /,
    out: str | None = None,
    compare: list[str] | None = None,
    data: str | None = None,
    unknown: OpenUnitInterval | None = None,
    trust: tuple[str, ...] = (),
) -> int:
    """Writes one self-contained HTML page about a checkpoint.

    The page shows test metrics with confidence intervals, the confusion matrix, ROC and precision-recall curves,
    calibration, the most confident errors, learning curves, the dataset and how the network was trained. A checkpoint
    that has not been tested yet is tested first; a bundle predicts the test images each time.

    Args:
        checkpoint: A checkpoint, a run's folder or a bundle; by default the newest run's best.ckpt.
        out: The HTML file to write; must not exist. By default report.html in the run, or in the bundle.
        compare: Runs to compare with, which have been tested on the same images, or bundles.
        data: The folder or table with the images of bundles; by default that of their runs.
        unknown: Show the test images that `predict --unknown` flags with this share of false alarms, such as 0.05.
        trust: Class path of the checkpoint's network, if that is neither this package's nor a library's; repeatable.
    """
    if out is not None:
        files.require_new(Path(out), "out")
    others = [ComparedRun.of(path, data) for path in compare or []]
    source = locate(checkpoint, trust)
    if data is not None and not any(each.is_bundle for each in (source, *map(locate, compare or []))):
        raise UserError(f"--data is for bundles; run: {command('test', source.file, '--data.root', data)}")
    if not source.is_bundle and not results.is_tested(source.file):
        from project.training import cli as trainer_cli  # Lightning: only where its Trainer is needed

        words = ["--ckpt_path", str(source.file), "--report", "false", *(f"--trust={name}" for name in trust)]
        trainer_cli.run("test", words)
    print(f"report: {page.write(source, None if out is None else Path(out), others, data, unknown)}")
    return 0
