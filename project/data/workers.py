"""The processes that read images: their number and how they start; without torch, for those that only count cores."""

import atexit
import multiprocessing.util  # the exit function that it registers runs after ours
import os
import signal
import threading

HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
LEFT_TO_MAIN = (signal.SIGINT, signal.SIGTERM)  # terminals, systemd, timeout and SLURM send these to all processes


def usable_cores() -> int:
    """Number of cores that this process may use, in a container or under a scheduler fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_server() -> None:
    """Starts the process that workers are forked from, which takes some seconds: call it early.

    SIGINT and SIGTERM stay blocked in all processes of the start method `forkserver`, from their first moment.
    """
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
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
    for number in LEFT_TO_MAIN:
        signal.signal(number, signal.SIG_IGN)  # where there is no server
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()  # PyTorch watches the parent's id, which is the server's
    os._exit(1)


def _end_workers() -> None:
    """Kills workers that are left when Python exits, which otherwise sends them SIGTERM and waits for them."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
