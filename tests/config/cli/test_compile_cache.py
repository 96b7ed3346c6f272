"""Compiled programs from one process to the next: the same results, and nothing that a damaged folder could break."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moerec.config import cli
from moerec.config.cli import compile_cache as module
from moerec.config.cli.compile_cache import compile_cache, limit_size, name_machine, remove_damaged

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from moerec.config import cli

def main(config, flags):
    import jax, jax.numpy as jnp
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
    folder = jax.config.jax_compilation_cache_dir

    @jax.jit
    def softened(x):
        return jax.nn.softmax(jnp.sin(x) @ x.T / 3).sum(axis=1)

    def call():
        jax.clear_caches()
        del events[:]
        bits = jax.device_get(softened(jnp.arange(600, dtype=jnp.float32).reshape(20, 30) / 7)).tobytes().hex()
        return {"bits": bits, "n_hits": events.count("cache_hits"), "n_misses": events.count("cache_misses")}

    found = [call()]
    if flags.damage:
        import pathlib
        for path in pathlib.Path(folder).glob("jit_softened-*-cache"):
            path.write_bytes(path.read_bytes()[:-20])
        found += [call(), call()]
    return {"folder": folder, "calls": found}

cli.run(main, extra_flags={"damage": (False, "truncates the entry")}, config_type=None, workdir=False)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def run(*args):
        command = [sys.executable, str(tmp_path / "program.py"), "--json", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def test_a_second_process_compiles_nothing_and_damage_costs_only_time(start, tmp_path):
    first, told = start()
    assert Path(first["folder"]).parent == tmp_path / "cache" / "moerec" / "jit"
    assert first["calls"][0]["n_hits"] == 0 < first["calls"][0]["n_misses"]
    assert told == ""
    second, told = start("--damage")
    restored, damaged, mended = second["calls"]
    assert restored["n_misses"] == 0 < restored["n_hits"]
    assert (damaged["n_misses"], mended["n_misses"]) == (1, 0)
    assert {call["bits"] for call in second["calls"]} == {first["calls"][0]["bits"]}
    assert told.startswith(f"{first['folder']}: the compiled jit_softened could not be read and is compiled anew (")
    assert told.count("\n") == 1


@pytest.fixture
def options(monkeypatch, tmp_path):
    """What JAX is told, without telling this process's; the user's home is a temporary one."""
    told = {}
    monkeypatch.setattr(module, "_set_option", lambda variable, value: told.update({variable: value}))
    for variable in (*(name for name in os.environ if name.startswith("JAX_")), "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return told


def test_where_the_programs_are_kept(options, monkeypatch, tmp_path):
    def folder_of(choice):
        options.clear()
        with compile_cache(choice):
            return options.get("JAX_COMPILATION_CACHE_DIR")

    machine = name_machine()
    assert folder_of("") == f"{tmp_path}/home/.cache/moerec/jit/{machine}"
    assert options["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] <= 0.1
    assert (tmp_path / "home/.cache/moerec/jit" / machine).stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert folder_of("") == f"{tmp_path}/home/.cache/moerec/jit/{machine}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of("") == f"{tmp_path}/xdg/moerec/jit/{machine}"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    assert folder_of("") == str(tmp_path / "jax")
    assert "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in options
    assert folder_of(str(tmp_path / "own")) == f"{tmp_path}/own/{machine}"
    assert folder_of("off") is None
    assert options == {"JAX_ENABLE_COMPILATION_CACHE": False}
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert folder_of("") is None


def test_a_command_that_compiles_for_other_devices_keeps_nothing(options, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    keeping = {"config_type": None, "workdir": False}
    assert cli.execute(lambda *_: None, ["x"], **keeping, keep_programs=False) == 0
    assert options == {"JAX_ENABLE_COMPILATION_CACHE": False}
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told_in_a_line(options, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with compile_cache(str(tmp_path / "file")):
        assert options == {}
    err = capsys.readouterr().err
    assert err.startswith(f"compiled programs are not kept: {tmp_path}/file")
    assert err.count("\n") == 1


def test_failures_of_the_cache_are_told_once_and_other_warnings_stay(options, capsys, tmp_path):
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("error")
        with compile_cache(str(tmp_path)):
            for name in ("jit_a", "jit_b"):
                reason = "OSError: [Errno 28] No space left on device\nand more"
                warnings.warn(f"Error writing persistent compilation cache entry for '{name}': {reason}", stacklevel=1)
            with pytest.raises(UserWarning, match="another"):
                warnings.warn("another", stacklevel=1)
            warnings.simplefilter("always")
            warnings.warn("a third", stacklevel=1)
    told = "the compiled jit_a could not be kept (OSError: [Errno 28] No space left on device)"
    assert capsys.readouterr().err == f"{tmp_path / name_machine()}: {told}\n"
    assert [str(other.message) for other in others] == ["a third"]


def test_what_was_used_least_recently_goes_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        path = tmp_path / "machine" / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e8))
    (tmp_path / "machine" / "notes").write_bytes(bytes(1000))
    limit_size(tmp_path, 300)
    assert len(list(tmp_path.glob("machine/*-cache"))) == 3
    limit_size(tmp_path, 250)
    assert {path.name for path in tmp_path.glob("machine/*")} == {"new-cache", "middle-cache", "notes"}


def test_only_the_damaged_entry_of_a_program_is_removed(tmp_path):
    import zlib

    whole = zlib.compress(b"program" * 50)
    entries = {"jit_f-1-cache": whole, "jit_f-2-cache": whole[:-5], "jit_g-3-cache": whole[:-5]}
    for name, content in entries.items():
        (tmp_path / name).write_bytes(content)
    remove_damaged(tmp_path, "jit_f")
    assert {path.name for path in tmp_path.iterdir()} == {"jit_f-1-cache", "jit_g-3-cache"}
    remove_damaged(tmp_path, "jit_f")  # it is whole, and could not be used
    assert {path.name for path in tmp_path.iterdir()} == {"jit_g-3-cache"}


def test_machines_differ_by_what_their_processors_can_do(monkeypatch):
    def name_with(flags, mhz="2000"):
        text = f"processor\t: 0\nmodel name\t: X\ncpu MHz\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return name_machine()

    assert name_with("sse avx2") == name_with("sse avx2", mhz="2001")
    assert name_with("sse avx2") != name_with("sse avx2 avx512f")


def test_help_does_not_import_jax():
    code = "import runpy, sys; sys.argv = ['train', '--helpfull']\n"
    code += "try: runpy.run_module('experiments.train', run_name='__main__')\n"
    code += "except SystemExit: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
