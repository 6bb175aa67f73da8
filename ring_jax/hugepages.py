"""Huge pages for the C library's allocations: a program's temporary buffers are fresh memory each time it runs on a CPU."""

import os
import pathlib
import sys

SETTING = "GLIBC_TUNABLES"
ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Start this process's command over with glibc told to ask for huge pages, where the kernel grants them on request.

    glibc reads the setting only as a process starts. Without it a training step spends much of its time in page faults (compare
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0 python -m ring_jax.train.bench`). Call it first in a command's `__main__`. Does nothing where
    the setting is already made or means nothing (another C library, another system).
    """
    if sys.platform != "linux" or SETTING in os.environ or not ENABLED.is_file() or "[madvise]" not in ENABLED.read_text():
        return
    os.environ[SETTING] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)  # the same process: signals and standard input stay where they are
