"""Memory of the host that freed buffers leave: glibc's allocator, which CPU backends allocate from."""

import contextlib
import ctypes
import os
import pathlib

MOST = 0.4  # of the machine's memory, above which freed memory goes back between steps
MISSING = (OSError, AttributeError, ValueError)  # not glibc, or not Linux: nothing to tune


def keep_freed_memory(*, keep: bool = True) -> None:
    """Tells glibc to keep freed memory, in one arena, instead of giving it back; or to do as it does by default.

    On CPU every step allocates the same large buffers; with fresh pages each time, a quarter to a third of a step's
    time goes to page faults (measured, see benchmarks/README.md). A thread that has allocated before keeps its own
    arena, which maps large blocks anew each time: so call it before JAX starts its threads. Numbers from malloc.h.
    """
    options = {  # parameter: (number, kept, glibc's default)
        "M_MMAP_MAX": (-4, 0, 65536),
        "M_TRIM_THRESHOLD": (-1, -1, 2**17),  # -1 is the largest size_t; 2 GiB are freed in every step of a 135M model
        "M_TOP_PAD": (-2, 2**28, 2**17),
        "M_ARENA_MAX": (-8, 1, 0),
    }
    with contextlib.suppress(*MISSING):
        libc = ctypes.CDLL(None)
        for number, kept, default in options.values():
            libc.mallopt(number, kept if keep else default)


def return_freed_memory(above: float = 0.0) -> None:
    """Gives freed memory back once, if the process holds more than a share of the machine's memory.

    Programs for batches of several widths each keep memory of their own, as large as their buffers.
    """
    with contextlib.suppress(*MISSING):
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        if resident > above * os.sysconf("SC_PHYS_PAGES"):
            ctypes.CDLL(None).malloc_trim(0)
