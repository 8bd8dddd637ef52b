"""Fits that are killed by SIGKILL at random instants, and go on until they are done: the same bits, nothing left over.

`make test-full` kills forty fits, `make test-slow` two. The processes are forked from one that has imported Lightning.
"""

import contextlib
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
CALLS = {"torch.save": 2, "fsync": 8, "replace": 8, "cache": 4, "metrics": 5, "events": 30, "rename": 1}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, calls, before=True):
    """The function, but its n-th call kills the process, before or after it has done its work."""
    left = [calls]

    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and before:
            die()
        made = function(*arguments, **options)
        if left[0] == 0:
            die()
        return made

    return call


def sabotage(where, calls, before):
    from torch.utils.tensorboard import SummaryWriter

    from project.data.cache import Cache
    from project.training import checkpoint_io, loggers

    if where == "torch.save":
        save = checkpoint_io.torch.save

        class Half:
            """A stream that kills the process when half of a checkpoint has gone through it."""

            def __init__(self, stream):
                self.stream, self.left = stream, 4_000_000

            def write(self, content):
                self.left -= len(content)
                made = self.stream.write(content)
                if self.left < 0:
                    self.stream.flush()
                    die()
                return made

            def flush(self):
                self.stream.flush()

        left = [calls]

        def save_half(content, stream):
            left[0] -= 1
            save(content, Half(stream) if left[0] == 0 else stream)

        checkpoint_io.torch.save = save_half
    elif where == "cache":
        put = Cache.put
        left = [calls * 7]

        def put_half(self, row, stamp, pixels):
            left[0] -= 1
            put(self, row, stamp, pixels)
            if left[0] == 0:
                size = self.file.stat().st_size
                os.truncate(self.file, size - pixels.nbytes // 2)
                die()

        Cache.put = put_half
    else:
        owner, name = {
            "fsync": (os, "fsync"),
            "replace": (Path, "replace"),
            "rename": (Path, "rename"),
            "metrics": (loggers.MetricsFile, "save"),
            "events": (SummaryWriter, "flush"),
        }[where]
        setattr(owner, name, dying(getattr(owner, name), calls, before))


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
    family = psutil.Process(process.pid)
    deadline = time.monotonic() + (instant or 90)
    children = []
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = family.children(recursive=True) or children
        process.join(0.01)
    if process.is_alive():
        assert instant is not None, (folder / "said").read_text()
        process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while alive := [child for child in children if runs(child)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)
    return process.exitcode


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # whoever has inherited it takes its time to notice
    except psutil.NoSuchProcess:
        return False


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
        (run,) = (place / "runs" / "photos").iterdir()
        assert_the_same(run, references[options] / "runs" / "photos" / "version_0")
        left = [file for file in place.rglob("*") if file.name.endswith(".tmp")]
        assert not left, (place / "said").read_text()
        shutil.rmtree(place)
    assert killed > fits / 2  # a fit may be done before its time comes
    assert shared_memory() <= before
    print(f"{fits} fits were killed {killed} times, in {', '.join(sorted(reached))} and at random")
