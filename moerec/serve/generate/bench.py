"""Tokens a second of prefill and decode, beside `transformers` and the machine's memory bandwidth."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import ModelConfig, TextConfig
from moerec.nn.model import TEXT_SIZES, SequenceModel
from moerec.serve.generate.matmul import count_bytes
from moerec.serve.generate.session import Generator, Timing
from moerec.train.base_model.hf_run import read_hf_model

REPEATS = 3  # of each measurement, in turn with the others; the shortest counts, as other work only adds to it
_BANDWIDTH_BYTES = 2**28
# 25.2 million parameters, as a Qwen2 has them: fewer key heads, biases, a tied head.
SHAPE = {"n_layers": 8, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_head": 64, "d_ff": 1280}
N_VOCAB = 8192
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "is_quantized": True},
}


def has_transformers() -> bool:
    """Whether there is something to compare with."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def measure_bandwidth() -> float:
    """Bytes a second that a sum over an array far beyond the caches reads, with all cores; the best of ten."""
    array = jnp.ones(_BANDWIDTH_BYTES // 4, jnp.float32).reshape(1024, -1)
    read = jax.jit(lambda x: jnp.sum(x, axis=1))
    return array.nbytes / min(_clock(lambda: jax.block_until_ready(read(array))) for _ in range(10))


def bench_generate(
    hf_folder: Path | None, batches: list[int], n_prompt: int, n_new: int, kinds: list[str]
) -> dict[str, Any]:
    """Rows for each type of weights and batch, the bandwidth in bytes a second, and torch's threads, or None.

    Args: a model of the Qwen2 family, None: a random one of 25 million parameters; prompts at once; tokens of each and
      of its answer; of `OPTIONS`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if hf_folder is None and has_transformers():
            hf_folder = _write_random(Path(temporary))
        other = _load_other(hf_folder) if hf_folder is not None and has_transformers() else None
        model = _make_random() if hf_folder is None else read_hf_model(hf_folder)[1]
        bandwidth, rows = measure_bandwidth(), []
        for kind in kinds:
            generator = Generator(model, **OPTIONS[kind])
            theirs = None if other is None or kind == "int8" else other(kind)
            for batch in batches:
                shape = batch, n_prompt
                prompts = np.random.default_rng(0).integers(0, model.config.text.vocab_size, shape)
                found = _measure(generator, theirs, prompts.astype(np.int32), n_new)
                read_s = _count_read(generator) / bandwidth
                found["limit_share"] = read_s / found["step_s"]
                rows.append({"weights": kind, "batch": batch, "mb": generator.n_bytes / 1e6, **found})
    return {"rows": rows, "bandwidth": bandwidth, "threads": None if other is None else other("threads")}


def _measure(
    generator: Generator, theirs: Callable[[np.ndarray, int], np.ndarray] | None, prompts: np.ndarray, n_new: int
) -> dict[str, Any]:
    generator.generate(list(prompts), n_new)  # compiles
    if theirs is not None:
        theirs(prompts, 2)
    own: list[Timing] = []
    first_s, whole_s, same = [], [], None
    for _ in range(REPEATS):
        generator.timing = Timing()
        answers = generator.generate(list(prompts), n_new, batch_size=len(prompts))
        own.append(generator.timing)
        if theirs is not None:
            first_s.append(_clock(lambda: theirs(prompts, 1)))
            started = time.perf_counter()
            tokens = theirs(prompts, n_new)
            whole_s.append(time.perf_counter() - started)
            same = float(np.mean(tokens == np.stack([answer.tokens for answer in answers])))
    step_s = min(timing.decode_s for timing in own) / (n_new - 1)
    found: dict[str, Any] = {
        "prefill_tokens_per_s": prompts.size / min(timing.prefill_s for timing in own),
        "decode_tokens_per_s": len(prompts) / step_s,
        "step_s": step_s,
        "n_compiled": generator.programs.n_compiled,
    }
    if theirs is not None:
        prefill, decode = prompts.size / min(first_s), len(prompts) * (n_new - 1) / (min(whole_s) - min(first_s))
        found |= {"torch_prefill_tokens_per_s": prefill, "torch_decode_tokens_per_s": decode, "same_tokens": same}
        found |= {
            "prefill_ratio": found["prefill_tokens_per_s"] / prefill,
            "decode_ratio": found["decode_tokens_per_s"] / decode,
        }
    return found


def _count_read(generator: Generator) -> int:
    """Bytes of weights that a step reads, all experts among them: of an embedding with a head beside it one row."""
    weights = generator.weights
    return generator.n_bytes - (0 if weights.head is None else count_bytes(weights.embedding))


def _clock(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _make_random() -> SequenceModel:
    config = ModelConfig(**SHAPE, dropout=0.0, text=TextConfig(vocab_size=N_VOCAB))  # type: ignore[arg-type]
    return jax.jit(lambda: SequenceModel(jax.random.key(0), config, TEXT_SIZES))()


def _write_random(folder: Path) -> Path:
    """The same shape by `transformers`, whose folder both read."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=N_VOCAB,
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_kv_heads"],
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def _load_other(folder: Path) -> Callable[[str], Any]:
    """What makes of a type's name a function from prompts `[B, T]` and a number n to tokens `[B, n]`."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    def load(kind: str) -> Any:
        if kind == "threads":
            return torch.get_num_threads()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, kind), local_files_only=True, trust_remote_code=False
        ).eval()

        @torch.no_grad()
        def generate(prompts: np.ndarray, n_new: int) -> np.ndarray:
            ids = torch.from_numpy(prompts.astype(np.int64))
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
            options |= {"max_new_tokens": n_new, "min_new_tokens": n_new}
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            return found[:, prompts.shape[1] :].numpy()

        return generate

    return load
