"""Keeps glibc from handing freed memory back to the system after every step.

XLA allocates and frees its temporaries anew each step on the CPU. By default glibc maps and unmaps blocks of that size,
and the page faults take as long as the arithmetic: the training step of the built-in world ran about twice as fast
without them. The price is a process that stays at its peak size.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP = 1 << 30


def disable_malloc_trim() -> bool:
    """Returns whether the C library took the settings (other libraries than glibc have no `mallopt`)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _KEEP), (_M_TRIM_THRESHOLD, 2 * _KEEP - 1), (_M_TOP_PAD, 1 << 26))
    taken = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return taken == [1, 1, 1]
