"""What this process asks of the machine it runs on."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep freed tensors' memory for the next ones instead of giving it back to the kernel each time.

    On a CPU, PyTorch allocates every activation anew; mapping and clearing those pages took half of all CPU time in
    training the miniature's autoencoder. Its UNet's smaller tensors were not seen to gain. Elsewhere than on glibc
    this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_ARENA_MAX, 1)  # the backward thread shares the main heap
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value glibc takes
    mallopt(_M_TRIM_THRESHOLD, 2_000_000_000)
