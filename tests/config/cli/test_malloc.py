"""Freed memory stays with the process, where the C library can be told so."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from moerec.config.cli import malloc as memory

ROOT = Path(__file__).resolve().parents[3]

# Without the settings glibc maps a block of this size, and unmaps it when it is freed: its pages are then zeroed anew
# for each run of a program that takes it. The first runs may still split what they find.
PROBE = """
import resource, sys
import jax
import jax.numpy as jnp
from moerec.config.cli.malloc import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
# Two products of 36 MiB that are needed at once.
program = jax.jit(lambda x: ((x @ x.T) * (x @ (2 - x.T))) @ x)
x = jnp.ones((3072, 8), jnp.float32)
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() >> 20, program.lower(x).compile().memory_analysis().temp_size_in_bytes >> 20)
"""


def probe(how: str) -> tuple[str, int, int]:
    """What was returned, MiB of pages that the last run of a program met for the first time, MiB it works in."""
    out = subprocess.run(
        [sys.executable, "-c", PROBE, how],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    answer, met, temporaries = out.stdout.split()
    return answer, int(met), int(temporaries)


def test_a_program_finds_the_memory_of_its_last_run():
    _, met, temporaries = probe("plain")
    assert temporaries > 64  # what no arena but the main one keeps
    if met < 20:
        pytest.skip("this allocator does not give freed blocks back in the first place")
    answer, met, _ = probe("keep")
    assert answer == "True"
    assert met <= 1


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert memory.keep_freed_memory() is False


def test_refused_settings_are_reported(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def mallopt(name, value):
            asked.append(name.value)
            return len(asked) != 2

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert memory.keep_freed_memory() is False
    # as malloc.h has them: M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD
    assert sorted(asked) == [-3, -2, -1]
