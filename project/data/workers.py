"""The processes that read pictures: how many, and where they come from."""

import multiprocessing
import os
import signal
import threading

HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()


def usable_cores() -> int:
    """Cores this process may use; a container's or scheduler's share, not the machine's whole number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_server() -> None:
    """Starts the process that workers come from, which takes some seconds: call it early."""
    if HAS_SERVER:
        from multiprocessing import forkserver  # not to be had on Windows

        multiprocessing.get_context("forkserver").set_forkserver_preload(["project.data.dataset"])
        forkserver.ensure_running()


def prepare(_: int) -> None:
    """Leaves Ctrl-C to the main process, and ends with it however it ends; a DataLoader calls this in each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()  # PyTorch watches the parent's id, which is the server's
    os._exit(1)
