"""Fits that are killed by SIGKILL at random instants, and go on until they are done: the same bits, nothing left over.

`make test-full` kills forty fits. The processes are forked from one that has imported Lightning.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import project.training.cli  # noqa: F401  before a fit is forked
from project import cli
from project.data.cache import Cache
from project.training import checkpoint_io, loggers
from tests.conftest import COLOURS, SMALL, THREADS, make_images
from tests.same_run import assert_the_same

COMMAND = ["fit", "--data.root", "photos", *SMALL, "--trainer.max_epochs", "4", "--trainer.log_every_n_steps", "3"]
COMMAND += ["--save_every", "0.002", "--resume", "auto"]  # a save every 0.1 s
FITS = 40
KILLS = 4  # of a fit at most, before it is left in peace


def half_a_checkpoint(save, content, stream):
    whole = io.BytesIO()
    save(content, whole)
    stream.write(whole.getvalue()[: whole.tell() // 2])
    stream.flush()


def half_a_row(put, cache, row, stamp, pixels):
    put(cache, row, stamp, pixels)
    os.truncate(cache.file, cache.file.stat().st_size - pixels.nbytes // 2)


# The calls in which a process kills itself: before or after their work, or in the middle of it, where there is a
# function for that. How many of them there may be before it is their turn.
CALLS = {
    "torch.save": (2, checkpoint_io.torch, "save", half_a_checkpoint),
    "fsync": (8, os, "fsync", None),
    "replace": (8, Path, "replace", None),
    "cache": (28, Cache, "put", half_a_row),
    "metrics": (5, loggers.MetricsFile, "log_metrics", None),
    "events": (30, SummaryWriter, "flush", None),
    "rename": (1, Path, "rename", None),  # between those of the previous and the new checkpoint
}


def sabotage(where, turn, before):
    """Makes the n-th call of a function kill the process."""
    _, owner, name, half = CALLS[where]
    function, turns = getattr(owner, name), itertools.count(1)

    def call(*arguments, **options):
        if next(turns) == turn:
            if half:
                half(function, *arguments, **options)
            elif not before:
                function(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, call)


def fit(folder, options, saboteur):
    os.chdir(folder)
    os.setsid()
    torch.set_num_threads(THREADS)
    with open("said", "a") as said:  # noqa: PTH123
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if saboteur is not None:
        sabotage(*saboteur)
    os._exit(cli.main([*COMMAND, *options]))


def nurse(jobs):
    """Forks a fit for each job; answers with its process and then with its exit code."""
    while (job := jobs.recv()) is not None:
        process = multiprocessing.get_context("fork").Process(target=fit, args=job)
        process.start()
        jobs.send(process.pid)
        process.join()
        jobs.send(process.exitcode)


@pytest.fixture(scope="module")
def nursery():
    jobs, other_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("forkserver").Process(target=nurse, args=(other_end,))
    process.start()
    yield jobs
    jobs.send(None)
    process.join()


def run_until_killed(nursery, folder, options, instant, saboteur):
    """Exit code of a fit; it is killed after so many seconds, where that is asked for."""
    nursery.send((str(folder), options, saboteur))
    family, children, deadline = psutil.Process(nursery.recv()), [], time.monotonic() + (instant or 90)
    while not nursery.poll(0.01) and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = family.children(recursive=True) or children
    if not nursery.poll():
        assert instant is not None, (folder / "said").read_text()
        with contextlib.suppress(psutil.NoSuchProcess):
            family.kill()
    code = nursery.recv()
    deadline = time.monotonic() + 20
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE:  # its heir takes its time to notice
                assert time.monotonic() < deadline
                time.sleep(0.01)
    return code


def shared_memory():
    """What lies in shared memory, without semaphores: those of these forks end with the tests' own process."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.mark.timeout(3000)
@pytest.mark.full
def test_killed_fits_go_on_to_the_same_bits_and_leave_nothing_over(nursery, tmp_path):
    references, usual = {}, {}
    for options in ((), ("--data.workers", "2")):  # every fifth fit has workers
        place = tmp_path / f"reference{len(options)}"
        make_images(place / "photos", dict.fromkeys(COLOURS, 40))
        started = time.monotonic()
        assert run_until_killed(nursery, place, options, None, None) == 0, (place / "said").read_text()
        references[options], usual[options] = place, time.monotonic() - started
    before, chance, killed, reached = shared_memory(), random.Random(7), 0, set()
    for number in range(FITS):
        place = tmp_path / str(number)
        options = ("--data.workers", "2") if number % 5 == 4 else ()
        shutil.copytree(references[options] / "photos", place / "photos")
        for attempt in range(KILLS + 1):
            instant, saboteur = None, None
            if attempt < KILLS and number % 2:
                instant = chance.uniform(0.1, 1.0) * usual[options]
            elif attempt < KILLS:
                where = list(CALLS)[(number // 2 + attempt) % len(CALLS)]
                saboteur = (where, chance.randint(1, CALLS[where][0]), chance.random() < 0.5)
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
    assert killed > FITS / 2  # a fit may be done before its time comes
    assert shared_memory() <= before
    print(f"{FITS} fits were killed {killed} times, in {', '.join(sorted(reached))} and at random")
