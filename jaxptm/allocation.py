"""How the process gets its memory from the operating system."""

from __future__ import annotations

import ctypes
import sys

# mallopt(3): the parameters' numbers in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep what is freed, so that each training step on a CPU has the memory of the one before.

    XLA allocates the buffers of a step anew. As it comes, malloc maps whatever is large from the kernel, gives it back
    when it is freed, and the kernel clears every page once more: 230 MB a step in a small model. The price: the process
    stays as large as it ever was.

    Call it before jax is imported: threads that have begun keep the arenas that they have.

    Returns:
        Whether it took effect; False where malloc is not glibc's (macOS, Windows, musl).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Arenas of threads give whole heaps back whatever the threshold, so there is to be one.
    taken = [mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))]
    return all(taken)
