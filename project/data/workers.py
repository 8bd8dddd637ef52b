"""The processes that read images: number, start and end; without torch, for those that only count cores."""

import atexit
import contextlib
import errno
import multiprocessing.util  # the exit function that it registers runs after ours
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

SHARED_MEMORY, CGROUPS, OWN_GROUPS = Path("/dev/shm"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
AHEAD, HELD = 2, 4  # batches that a worker reads ahead; that the main process holds, for all its loaders
FILES = 12  # open in the main process for each worker; twice as many without any
HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
LEFT_TO_MAIN = (signal.SIGINT, signal.SIGTERM)  # terminals, systemd, timeout and SLURM send these to all processes


def usable_cores() -> int:
    """Number of cores that this process may use: fewer than the machine has in a container or under a scheduler."""
    cores = _cores()
    for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines() if OWN_GROUPS.exists() else []:
        _, controllers, group = line.split(":", 2)
        own, names = CGROUPS / group.strip("/"), ["cpu.max"]
        if "cpu" in controllers.split(","):  # version 1
            own, names = CGROUPS / "cpu" / group.strip("/"), ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        for folder in (own, *own.parents):  # a container may see its own group as the root
            with contextlib.suppress(OSError, ValueError):  # no quota: no file, or the word max
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                cores = min(cores, quota // period) if quota > 0 else cores
    return max(1, cores)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads() -> None:
    """Keeps torch and NumPy, which count cores only, within a quota of CPU time; NumPy if it is imported later."""
    if (cores := usable_cores()) < _cores() and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(cores)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(min(cores, torch.get_num_threads()))


def that_fit(workers: int, batch_bytes: int) -> tuple[int, int]:
    """Numbers of workers and of batches that each reads ahead for which shared memory has room; prints if it has not.

    Docker gives a container 64 MB of it by default, and workers cannot hand over batches once it is full.
    """
    limit, needed = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 0, FILES * (workers + 2)
    if workers and 0 < limit < needed:
        few = f"--data.workers {workers} needs {needed} open files, but the limit is {limit} (see ulimit -n)"
        print(f"{few}: {(workers := max(0, limit // FILES - 2))} are used", flush=True)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else sys.maxsize
    batches = max(0, (free - 2**20) // batch_bytes - HELD) // 2  # for training and validation each
    if batches >= workers * AHEAD:
        return workers, AHEAD
    fewer, need = min(workers, batches), ((2 * workers * AHEAD + HELD) * batch_bytes >> 20) + 2
    how = f"each {batches // fewer} batches ahead" if fewer else "and the main process reads the images"
    print(
        f"{SHARED_MEMORY} has {free >> 20} of the {need} MB that --data.workers {workers} and this batch size need: "
        f"{fewer} are used, {how}. In a container: docker run --shm-size {need}m",
        flush=True,
    )
    return fewer, batches // max(1, fewer)


def why_lost(error: BaseException, workers: Sequence[BaseProcess] = ()) -> str:
    """A sentence about what has ended a worker or which limit is reached; empty for all other errors."""
    for worker in workers:
        worker.join(0.1)
    text, codes = str(error), [worker.exitcode for worker in workers if worker.exitcode]
    signals = [signal.Signals(-code).name for code in codes if code < 0]
    fewer = "give fewer --data.workers or a smaller --data.batch_size"
    if os.strerror(errno.EMFILE) in text or "items of ancdata" in text:
        limit = os.sysconf("SC_OPEN_MAX")
        return f"Too many open files: the limit is {limit}; raise it: ulimit -n 1024."
    if "SIGBUS" in signals or ("shared memory" in text and os.strerror(errno.ENOSPC) in text):
        return f"{SHARED_MEMORY} is probably full: {fewer}; in a container, docker run --shm-size 1g."
    if "SIGKILL" in signals:
        return f"A worker was killed (SIGKILL), probably because memory ran out: {fewer}."
    script = Path(str(getattr(main := sys.modules["__main__"], "__file__", None)))
    is_script = script.suffix == ".py" and main.__spec__ is None  # not python -m; workers import it
    hint = f'; what {script.name} runs has to stand below if __name__ == "__main__":' * is_script
    return f"A worker has ended ({[*signals, *codes][0]}); --data.workers 0 may show why{hint}." if codes else ""


def start_server() -> None:
    """Starts the process that workers are forked from, which takes some seconds: call it early.

    SIGINT and SIGTERM stay blocked in all processes of the start method `forkserver`, from their first moment.
    """
    if HAS_SERVER:
        from multiprocessing import forkserver, resource_tracker  # missing on Windows

        multiprocessing.get_context("forkserver").set_forkserver_preload(["project.data.dataset"])
        resource_tracker.ensure_running()  # here, because its start unblocks the signals
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_MAIN)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare(_: int) -> None:
    """Makes a worker leave signals to the main process and end with it, however that ends; the DataLoader calls it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where there is no server
    follow()


def follow() -> None:
    """Makes a process, as of a pool, leave Ctrl-C to the main process and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()  # PyTorch watches the parent's id, which is the server's
    os._exit(1)


@atexit.register
def _end_workers() -> None:
    """Kills workers that are left when Python exits, which otherwise sends them SIGTERM and waits for them."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
