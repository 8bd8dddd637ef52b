"""Several processes: how many were started, whether all have the same, and a sentence where they lose each other."""

import contextlib
import hashlib
import itertools
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from project.data.paths import Paths
from project.errors import FailedRun, UserError, some
from project.training.callbacks import data_of, gather
from project.training.loop_state import LOOP_STATE
from project.training.resume import FREE, flat_options
from project.training.source_checkpoint import SourceCheckpoint

PACKAGE = Path(__file__).parents[1]
LOCAL = FREE | {"data.root", "data.split", "name", "resume"}  # options that may differ between machines


def launched(nodes: int, devices: Any) -> dict[str, int]:
    """The Trainer's `num_nodes` and `devices` where torchrun or srun has started several processes; else nothing.

    Options that are given stay; a UserError where they are another number of processes.
    """
    started = {}
    if TorchElasticEnvironment.detect():
        started = {"num_nodes": int(os.environ["GROUP_WORLD_SIZE"]), "devices": int(os.environ["LOCAL_WORLD_SIZE"])}
    elif SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        machines = int(os.environ.get("SLURM_NNODES", 1))
        started = {"num_nodes": machines, "devices": tasks // machines}
    if not started or (nodes, devices) == (1, "auto"):
        return started
    count = math.prod(started.values())
    if str(devices).isdigit() and nodes * int(devices) != count:
        given = f"--trainer.devices {devices} and --trainer.num_nodes {nodes}"
        raise UserError(f"{given} are {nodes * int(devices)} processes, but {count} were started; leave both out.")
    return {}


class SameOnAllRanks(Callback):
    """Compares code, options, images and checkpoint of all ranks before the first step."""

    def __init__(self, options: dict[str, Any], source: SourceCheckpoint | None) -> None:
        same = [f"--{name} {value}" for name, value in flat_options(options).items() if name not in LOCAL]
        content = source.content if source else {}
        at = content.get(LOOP_STATE, {}).get("at")
        self._own = {"options": same, "checkpoint": [f"step {content.get('global_step')} at {at}"]}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError on the first rank, and ends the others, where one has something else."""
        if trainer.world_size == 1:
            return
        manifest = data_of(trainer).manifest
        sources = [path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))]
        names, paths = (Paths.of(texts).encoded for texts in (manifest.class_names, manifest.paths))
        rows = [column.tobytes() for column in (names, paths, manifest.labels, manifest.splits)]
        self._own |= {
            "code": [f"torch {torch.__version__}", f"Lightning {lightning.__version__}", f"project {_digest(sources)}"],
            "images": [f"{len(manifest.paths):,} images", f"names and labels {_digest(rows)}"],
        }
        ranks = gather(trainer, {"host": socket.gethostname(), **self._own})
        for kind, (rank, other) in itertools.product(self._own, enumerate(ranks)):
            theirs = [text for text in other[kind] if text not in ranks[0][kind]]
            ours = [text for text in ranks[0][kind] if text not in other[kind]]
            if not theirs + ours:
                continue
            if not trainer.is_global_zero:
                time.sleep(10)  # when this rank ends, torchrun ends the first one, which has to say why
                raise SystemExit(2)
            raise UserError(
                f"Rank {rank} on {other['host']} has other {kind} than rank 0 on {ranks[0]['host']}: "
                f"{some(theirs)}, not {some(ours)}; give every machine the same."
            )


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """Raises FailedRun where an error within is that of the communication with another process."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).strip().splitlines()[0])
        hint = "the messages of the others say why, if they could"
        raise FailedRun(f"The processes of this command have lost each other ({reason}); {hint}.") from error


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]
