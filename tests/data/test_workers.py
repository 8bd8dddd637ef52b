"""workers.py: how many workers the limit of open files allows, and what has ended one."""

import errno
import faulthandler
import multiprocessing
import os
import re
import resource
import signal
import sys
from types import SimpleNamespace

import pytest

from project.data import workers

BATCH = 2**20
FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize(("limit", "expected"), [(60, 3), (40, 1), (20, 0)])
def test_workers_that_need_more_open_files_than_allowed_are_not_used(limit, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path / "none")  # as on Windows
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        assert workers.that_fit(4, BATCH)[0] == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    said = f"--data.workers 4 needs 72 open files, but the limit is {limit} (see ulimit -n): {expected} are used\n"
    assert capsys.readouterr().out == said


def ended(number):
    """A worker that this signal has ended."""

    def end():
        faulthandler.disable()  # pytest's, which would print the stack
        os.kill(os.getpid(), number)

    worker = FORK.Process(target=end)
    worker.start()
    worker.join()
    return worker


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SIGKILL", r"was killed \(SIGKILL\), probably because memory ran out: give fewer --data\.workers"),
        ("SIGBUS", r"is probably full: give fewer --data\.workers or a smaller --data\.batch_size; in a container"),
        ("SIGTERM", r"^A worker has ended \(SIGTERM\); --data\.workers 0 may show why\.$"),
    ],
    ids=["SIGKILL", "SIGBUS", "SIGTERM"],
)
def test_the_signal_that_ended_a_worker_is_told_with_what_helps(name, said):
    assert re.search(said, workers.why_lost(RuntimeError(), [ended(signal.Signals[name])]))


def test_a_limit_that_is_reached_is_told_and_any_other_error_is_no_lost_worker(monkeypatch):
    assert "Too many open files: the limit is" in workers.why_lost(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "is probably full" in workers.why_lost(RuntimeError(f"shared memory: {os.strerror(errno.ENOSPC)}"))
    assert workers.why_lost(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == ""
    worker = FORK.Process(target=os._exit, args=(3,))
    worker.start()
    worker.join()
    assert workers.why_lost(EOFError(), [worker]) == "A worker has ended (3); --data.workers 0 may show why."
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__="a/own.py", __spec__=None))
    guard = 'what own.py runs has to stand below if __name__ == "__main__":.'
    assert workers.why_lost(EOFError(), [worker]).endswith(guard)
