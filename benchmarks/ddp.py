"""What it costs to train with several processes: AlexNet's gradients, DDP's options, and a model for machines."""

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from project.models import build

SIZE, BATCH, ACCUMULATED = 64, 8, 4  # pixels, images of a process, batches of an optimizer step
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "bucket_cap_mb 100": {"bucket_cap_mb": 100},
    "static_graph": {"static_graph": True},
    "bf16_compress_hook": {},
    f"accumulate {ACCUMULATED} batches": {},
}


def ddp(rounds: int = 5) -> dict[str, Any]:
    """Times the all-reduce of AlexNet's gradients by 1, 2 and 4 processes, and a training step of 2 with DDP's options.

    Args:
        rounds: Steps that count, after one that warms up.
    """
    reduced = {count: _spawn(count, "all_reduce", rounds)["float32"] for count in (1, 2, 4)}
    steps = _spawn(2, "steps", rounds)
    size = sum(parameter.numel() for parameter in build("alexnet", 1000).parameters()) * 4
    print(f"all-reduce of {size / 1e6:.0f} MB, gloo, one machine: ", end="")
    print(", ".join(f"{count} processes {seconds:.2f} s" for count, seconds in reduced.items()))
    print(f"\na batch of AlexNet, 2 processes x {BATCH} images of {SIZE} px     seconds   of default's")
    for name, seconds in steps.items():
        print(f"  {name:46}  {seconds:10.2f}   {seconds / steps['default']:6.2f} x")
    print("\nmodel: an all-reduce moves 2 (N - 1) / N of the gradients over each machine's link, at its full speed")
    print(f"  {'Gbit/s':>8}" + "".join(f"{f'N = {n}':>10}" for n in (2, 4, 8, 16)))
    model = {speed: {n: 2 * (n - 1) / n * size * 8 / speed / 1e9 for n in (2, 4, 8, 16)} for speed in (10, 25, 100)}
    for speed, row in model.items():
        print(f"  {speed:>8}" + "".join(f"{seconds:8.3f} s" for seconds in row.values()))
    return {"all_reduce": reduced, "steps": steps, "model": model}


def _spawn(count: int, measure: str, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (count, measure, rounds, folder), count)  # type: ignore[attr-defined,no-untyped-call]
        return dict(json.loads(Path(folder, "figures.json").read_text()))


def _rank(rank: int, count: int, measure: str, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    figures = {"all_reduce": _all_reduce, "steps": _steps}[measure](rounds)
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))
    distributed.destroy_process_group()


def _all_reduce(rounds: int) -> dict[str, float]:
    gradients = torch.cat([parameter.detach().flatten() for parameter in build("alexnet", 1000).parameters()])
    return {"float32": _median(lambda: distributed.all_reduce(gradients), rounds)}


def _steps(rounds: int) -> dict[str, float]:
    """Median seconds of a batch with each option, measured in turn."""
    image = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    seconds = dict[str, float]()
    for name, options in OPTIONS.items():
        model = DistributedDataParallel(build("alexnet", 1000), **options)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        if name == "bf16_compress_hook":
            model.register_comm_hook(None, bf16_compress_hook)
        batches = ACCUMULATED if name.startswith("accumulate") else 1

        def step(model: Any = model, optimizer: Any = optimizer, batches: int = batches) -> None:
            optimizer.zero_grad()
            for number in range(batches):
                with model.no_sync() if number < batches - 1 else contextlib.nullcontext():
                    model(image).float().logsumexp(1).mean().backward()
            optimizer.step()

        seconds[name] = _median(step, rounds) / batches
    return seconds


def _median(step: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        distributed.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
