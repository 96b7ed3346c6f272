"""Eight fake CPU devices for every test, repeatable property tests, and the folder of the real data."""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # compiling for TPUs must not ask the network whether this is one
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and two processes may do so at a time
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Programs of tests run once and are small: they take longer to compile than to run. XLA dies of a flag that it does not
# know, and each version has another one for fast compiles: that of 0.10 makes them take less than half as long.
FAST_COMPILES = {"0.10": "--xla_cpu_use_fusion_emitters=false", "0.12": "--xla_cpu_opt_preset=fast_compile"}
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    release = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
    os.environ["XLA_FLAGS"] += f" --xla_backend_optimization_level=0 {FAST_COMPILES.get(release, '')}"
# One cache of compiled programs for this session and its child processes: many tests train the same tiny model.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moerec-jax-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Tracing makes millions of objects that live on: looking through them as often as Python does takes a tenth of it.
gc.set_threshold(100_000, 20, 100)

import hypothesis  # noqa: E402 - what is set above is read at import
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]

# No deadline: the first example of a test compiles. Derandomised: a test that passed passes again.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


# The longest files, longest first: two processes take a file at a time, and neither should be left with one at the end.
LONG = """test_real_weights test_loop test_large_step test_plan test_qwen2 test_text test_tpu_step test_sharding
test_experiments test_expert_parallel test_grouped_ffn test_configs test_warm_start test_profile_attention
test_model test_profile_store test_lowering test_memory test_routing test_step test_attention_tpu
test_tpu_compile_attention test_tpu_compile_grouped_ffn test_experts test_dispatch test_notebooks
test_repository""".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_unconfigure():
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs keep pages of memory mapped, of which a process may have 65,530: beyond them XLA crashes."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of the real data sets; MOEREC_DATA overrides where it is."""
    folder = pathlib.Path(os.environ.get("MOEREC_DATA") or ROOT / "../shared/data")
    if not folder.is_dir():
        pytest.skip("the real data is not here: neither ../shared/data nor MOEREC_DATA is a folder")
    return folder
