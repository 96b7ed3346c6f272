"""Keeps freed memory with the process, where what runs next finds it again.

XLA allocates and frees its temporaries anew each step on the CPU. By default glibc maps and unmaps blocks of that size,
and the page faults take up to as long as the arithmetic: they were a third of the time of the built-in world's step.
Only the main arena keeps blocks above 64 MiB, and only the main thread is sure to have it; so programs run in the
thread that calls them. (One arena for all threads would do as well, but then these wait for each other: compilation
takes a third longer, and the step of two cores twice as long.) The price is a process that stays at its peak size.
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Returns whether the C library took the settings (other libraries than glibc have no `mallopt`).

    To be called before JAX looks for its devices: later than that, programs still run in a thread of JAX's own.
    """
    import jax  # takes half a second, which a command that is used wrongly need not wait for

    with contextlib.suppress(AttributeError):  # a JAX without the option
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _KEEP), (_M_TRIM_THRESHOLD, 2 * _KEEP - 1), (_M_TOP_PAD, 1 << 26))
    taken = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return taken == [1, 1, 1]
