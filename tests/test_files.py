import os
import platform
import subprocess
import sys
from pathlib import Path

from project import files


def test_the_next_writer_into_a_folder_removes_what_killed_ones_have_left(workplace):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, node in ((ended.pid, platform.node()), (ended.pid, "another-machine"), (os.getpid(), platform.node())):
        Path(f".a.csv.{process}@{node}.0.tmp").touch()
    with files.replacing(Path("b.csv")) as stream:
        stream.write("whole")
    kept = [f".a.csv.{ended.pid}@another-machine.0.tmp", f".a.csv.{os.getpid()}@{platform.node()}.0.tmp"]
    assert sorted(os.listdir()) == sorted([*kept, "b.csv"])
    files.sweep(Path(), mine=True)
    assert os.listdir() == ["b.csv"]
