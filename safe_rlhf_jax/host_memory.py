"""Memory of the host that freed buffers leave: glibc's allocator, which CPU backends allocate from."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os

MOST_KEPT = 0.25  # of the machine's memory
MEMORY_LIMIT = "/sys/fs/cgroup/memory.max"  # of a container
MISSING = (OSError, AttributeError, ValueError)  # not glibc, or not Linux: nothing to tune


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h: bytes of glibc's arenas and of blocks that are mapped by themselves."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "mapped",
            "usmblks",
            "fsmblks",
            "used",
            "fordblks",
            "keepcost",
        ]
    )


def is_cpu_alone() -> bool:
    """Says, before JAX is imported, whether its backend can only be the CPU."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not importlib.metadata.entry_points(group="jax_plugins") and importlib.util.find_spec("libtpu") is None


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, in one arena, instead of giving it back; glibc cannot be told to forget it.

    On CPU every step allocates the same large buffers; with fresh pages each time, a quarter to a third of a step's
    time goes to page faults (measured, see benchmarks/README.md). A thread that has allocated before keeps its own
    arena, which maps large blocks anew each time: so call it before JAX starts its threads. Numbers from malloc.h.
    """
    options = {
        "M_MMAP_MAX": (-4, 0),
        "M_TRIM_THRESHOLD": (-1, -1),  # -1 is the largest size_t: 2 GiB are freed in every step of a 135M model
        "M_TOP_PAD": (-2, 2**28),
        "M_ARENA_MAX": (-8, 1),
    }
    with contextlib.suppress(*MISSING):
        libc = ctypes.CDLL(None)
        for number, value in options.values():
            libc.mallopt(number, value)


def return_freed_memory(above: float = 0.0) -> None:
    """Gives freed memory back once, if the process keeps more than a share of the machine's memory.

    Programs for batches of several widths each keep memory of their own, as large as their buffers.
    """
    with contextlib.suppress(*MISSING):
        libc = ctypes.CDLL(None)
        if not above or kept_memory(libc) > above * machine_memory():
            libc.malloc_trim(0)


def kept_memory(libc: ctypes.CDLL) -> int:
    """Returns the bytes that are resident and in no allocated block: freed ones, and what is no block at all."""
    from safe_rlhf_jax import storage

    resident = int(storage.read_text(storage.path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    libc.mallinfo2.restype = MallInfo
    found = libc.mallinfo2()
    return int(resident - found.used - found.mapped)


def machine_memory() -> int:
    """Returns the bytes of memory that the process may use."""
    from safe_rlhf_jax import storage

    physical, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), storage.path(MEMORY_LIMIT)
    said = storage.read_text(limit).strip() if storage.is_file(limit) else "max"
    return physical if said == "max" else min(physical, int(said))
