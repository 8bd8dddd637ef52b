"""What a run holds, and whether two runs are the same, bit for bit and point for point."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import runs
from tests.conftest import read_csv


def checkpoint(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def logged(run):
    """Rows of metrics.csv, and every scalar in TensorBoard's files; of what a clock has measured only the steps."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(e.step, None if tag.startswith("speed/") else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    return read_csv(run / "metrics.csv"), curves, [e.step for e in events.Images("train/first_batch")]


def differences(one, two, path=""):
    """Where two checkpoints differ, bit for bit; clocks and what is called after the run's folder left out."""
    if path.endswith(("/seconds", "/time", "path", "dirpath", "best_k_models", "current_score", "/warned")):
        return []
    if isinstance(one, torch.Tensor):
        return [] if isinstance(two, torch.Tensor) and torch.equal(one, two) else [path]
    if isinstance(one, dict):
        places = [f"{path}: {one.keys() ^ two.keys()}"] if one.keys() != two.keys() else []
        return places + [d for key in one.keys() & two.keys() for d in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        same = len(one) == len(two)
        return [d for n, pair in enumerate(zip(one, two, strict=same)) for d in differences(*pair, f"{path}/{n}")]
    return [] if one == two or one != one else [f"{path}: {one} {two}"]


def assert_the_same(run, other):
    assert not differences(checkpoint(run), checkpoint(other))
    for part in ("state_dict", "metadata", "epoch", "global_step"):  # Lightning adds counters that nothing reads
        assert not differences(checkpoint(run, "best")[part], checkpoint(other, "best")[part])
    for part, other_part in zip(logged(run), logged(other), strict=True):
        assert part == other_part
    assert (run / "split.csv").read_bytes() == (other / "split.csv").read_bytes()
    assert (run / "config.yaml").read_bytes() == (other / "config.yaml").read_bytes()
    assert runs.read_status(run)["state"] == "finished"
