"""Keeps glibc from handing freed memory back to the system after every step.

XLA allocates and frees its temporaries anew each step on the CPU. By default glibc maps and unmaps blocks of that size,
and the page faults take up to as long as the arithmetic: they were a third of the time of the built-in world's step.
The price is a process that stays at its peak size.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEEP = 1 << 30


def disable_malloc_trim() -> bool:
    """Returns whether the C library took the settings (other libraries than glibc have no `mallopt`).

    To be called before JAX starts its threads: those that have an arena of their own by then keep it, and no block
    above 64 MiB fits into one. All share the main one here, which has no limit.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _KEEP),
        (_M_TRIM_THRESHOLD, 2 * _KEEP - 1),
        (_M_TOP_PAD, 1 << 26),
        (_M_ARENA_MAX, 1),
    )
    taken = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return taken == [1] * len(settings)
