"""Freed memory stays with the process, where the C library can be told so."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from moerec.config.cli import malloc as memory

ROOT = Path(__file__).resolve().parents[3]

# Without the settings glibc maps a block of this size, and unmaps it when it is freed.
PROBE = """
import ctypes, sys, threading
from moerec.config.cli.malloc import disable_malloc_trim

if sys.argv[1] == "keep":
    print(disable_malloc_trim())
else:
    print(None)
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1])

def use():
    size = 200 << 20
    c.free(c.malloc(1000))
    before = resident()
    block = c.malloc(size)
    ctypes.memset(block, 1, size)
    touched = resident()
    c.free(block)
    print(touched - before >> 10, resident() - before >> 10)

if sys.argv[2] == "main":
    use()
else:
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
"""


def probe(how: str, thread: str) -> tuple[str, int, int]:
    """What was returned, MiB resident when touched and when freed."""
    out = subprocess.run(
        [sys.executable, "-c", PROBE, how, thread],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    answer, touched, freed = out.stdout.split()
    return answer, int(touched), int(freed)


@pytest.mark.parametrize("thread", ["main", "another"])
def test_freed_memory_is_kept(thread):
    """XLA allocates in a thread of its own, where glibc keeps a block of that size in the main arena alone."""
    _, touched, freed = probe("plain", thread)
    if touched < 190 or freed > 20:
        pytest.skip("this allocator does not give freed blocks back in the first place")
    answer, touched, freed = probe("keep", thread)
    assert answer == "True"
    assert freed >= touched - 20 >= 170


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert memory.disable_malloc_trim() is False


def test_refused_settings_are_reported(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def mallopt(name, value):
            asked.append(name.value)
            return len(asked) != 2

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert memory.disable_malloc_trim() is False
    # as malloc.h has them: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
    assert sorted(asked) == [-8, -3, -2, -1]
