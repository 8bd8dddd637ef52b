"""Keeps the memory of one training step for the next one."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, where it would give large blocks back to the system and fetch them anew.

    A step of AlexNet frees and takes again some 2 GB of activations and gradients, and the kernel clears every page of
    them: without that a step takes 0.91 of the time on two cores. Does nothing where there is another C library; an
    accelerator has an allocator of its own, which does the same.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
