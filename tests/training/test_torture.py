"""Fits that are killed by SIGKILL at random instants, and go on until they are done: the same bits, nothing left over.

`make test-full` kills forty fits, `make test-slow` two. The processes are forked from one that has imported Lightning.
"""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import COLOURS, SMALL, THREADS, make_images
from tests.same_run import assert_the_same

COMMAND = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "3"]
COMMAND += ["--save_every", "0.002", "--resume", "auto"]  # a save every 0.1 s
KILLS = 4  # of a fit at most, before it is left in peace
# The calls in which a process kills itself: in the middle of a checkpoint, before and after it is brought to the disk,
# between the renames of the previous and the new one, while cache and logs are written.
# How many of them there may be before it is their turn.
CALLS = {"torch.save": 2, "fsync": 8, "replace": 8, "cache": 28, "metrics": 5, "events": 30, "rename": 1}


def half_a_checkpoint(save, content, stream):
    whole = io.BytesIO()
    save(content, whole)
    stream.write(whole.getvalue()[: whole.tell() // 2])
    stream.flush()


def half_a_row(put, cache, row, stamp, pixels):
    put(cache, row, stamp, pixels)
    os.truncate(cache.file, cache.file.stat().st_size - pixels.nbytes // 2)


def sabotage(where, calls, before):
    """Makes the n-th call of a function kill the process: before or after its work, or in the middle of it."""
    from torch.utils.tensorboard import SummaryWriter

    from project.data.cache import Cache
    from project.training import checkpoint_io, loggers

    def nothing_or_all(function, *arguments, **options):
        if not before:
            function(*arguments, **options)

    owner, name, part = {
        "torch.save": (checkpoint_io.torch, "save", half_a_checkpoint),
        "cache": (Cache, "put", half_a_row),
        "fsync": (os, "fsync", nothing_or_all),
        "replace": (Path, "replace", nothing_or_all),
        "rename": (Path, "rename", nothing_or_all),
        "metrics": (loggers.MetricsFile, "log_metrics", nothing_or_all),
        "events": (SummaryWriter, "flush", nothing_or_all),
    }[where]
    function, left = getattr(owner, name), [calls]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            part(function, *arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, call)


def fit(folder, options, saboteur):
    import torch

    from project import cli

    os.chdir(folder)
    os.setsid()
    torch.set_num_threads(THREADS)
    with open("said", "a") as said:  # noqa: PTH123
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if saboteur is not None:
        sabotage(*saboteur)
    os._exit(cli.main([*COMMAND, *options]))


@pytest.fixture(scope="module")
def nursery():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["project.training.cli", "project.commands.tune"])
    first = context.Process(target=time.sleep, args=(0,))  # waits for the imports
    first.start()
    first.join()
    return context


def run_until_killed(nursery, folder, options, instant, saboteur):
    """Exit code of a fit; it is killed after so many seconds, where that is asked for."""
    process = nursery.Process(target=fit, args=(str(folder), options, saboteur))
    process.start()
    family, children, deadline = psutil.Process(process.pid), [], time.monotonic() + (instant or 90)
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = family.children(recursive=True) or children
        process.join(0.01)
    if process.is_alive():
        assert instant is not None, (folder / "said").read_text()
        process.kill()
    process.join()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]  # its heir takes its time to notice
    return process.exitcode


def shared_memory():
    """What lies in shared memory, without semaphores: those of these forks end with the tests' own process."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "fits",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.full)],
    ids=lambda n: f"{n} fits",
)
def test_killed_fits_go_on_to_the_same_bits_and_leave_nothing_over(nursery, tmp_path, fits):
    references, usual = {}, {}
    for options in ((), ("--data.workers", "2"))[: 2 if fits > 4 else 1]:  # every fifth fit has workers
        place = tmp_path / f"reference{len(options)}"
        make_images(place / "photos", dict.fromkeys(COLOURS, 40))
        started = time.monotonic()
        assert run_until_killed(nursery, place, options, None, None) == 0, (place / "said").read_text()
        references[options], usual[options] = place, time.monotonic() - started
    before, chance, killed, reached = shared_memory(), random.Random(7), 0, set()
    for number in range(fits):
        place = tmp_path / str(number)
        options = ("--data.workers", "2") if number % 5 == 4 else ()
        shutil.copytree(references[options] / "photos", place / "photos")
        for attempt in range(KILLS + 1):
            instant, saboteur = None, None
            if attempt < KILLS and number % 2:
                instant = chance.uniform(0.1, 1.0) * usual[options]
            elif attempt < KILLS:
                where = list(CALLS)[(number // 2 + attempt) % len(CALLS)]
                saboteur = (where, chance.randint(1, CALLS[where]), chance.random() < 0.5)
            code = run_until_killed(nursery, place, options, instant, saboteur)
            assert code in (0, -signal.SIGKILL), (place / "said").read_text()
            killed += code != 0
            reached |= {saboteur[0]} if code and saboteur else set()
            if code == 0:
                break
        (run,) = place.glob("runs/photos/version_*")
        assert_the_same(run, references[options] / "runs" / "photos" / "version_0")
        assert not list(run.glob("checkpoints/.*")), (place / "said").read_text()
        shutil.rmtree(place)
    assert killed > fits / 2  # a fit may be done before its time comes
    assert shared_memory() <= before
    print(f"{fits} fits were killed {killed} times, in {', '.join(sorted(reached))} and at random")
