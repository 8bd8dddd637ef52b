"""The processes that read images: their number and how they start; without torch, for those that only count cores."""

import multiprocessing
import os
import signal
import threading

HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()


def usable_cores() -> int:
    """Number of cores that this process may use, in a container or under a scheduler fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_server() -> None:
    """Starts the process that workers are forked from, which takes some seconds: call it early."""
    if HAS_SERVER:
        from multiprocessing import forkserver  # missing on Windows

        multiprocessing.get_context("forkserver").set_forkserver_preload(["project.data.dataset"])
        is_main = threading.current_thread() is threading.main_thread()  # only it may set a handler
        # server and workers inherit it from their first moment: a terminal sends Ctrl-C to all processes
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        forkserver.ensure_running()
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def prepare(_: int) -> None:
    """Makes a worker ignore Ctrl-C and end with the main process, however that ends; the DataLoader calls it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()  # PyTorch watches the parent's id, which is the server's
    os._exit(1)
