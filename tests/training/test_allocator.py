"""Freed memory is kept for the next step."""

import subprocess
import sys

import pytest

MEASURE = """
import resource
import numpy as np
from project.training.allocator import keep_freed_memory

{call}
np.ones(60_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(60_000_000)  # 480 MB, taken and freed
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(call):
    ran = subprocess.run([sys.executable, "-c", MEASURE.format(call=call)], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_memory_that_is_taken_again_is_not_fetched_from_the_system_again():
    assert page_faults("keep_freed_memory()") < 0.1 * page_faults("")
