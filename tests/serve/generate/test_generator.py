"""Batches of prompts: the tokens of each are its own, by two programs a bucket, on one device and on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moerec.errors import InputError
from moerec.nn.model import TEXT_SIZES
from moerec.nn.sharding import make_mesh, param_shardings
from moerec.serve.generate import Generator, Sampling
from moerec.serve.generate.programs import CHUNK
from moerec.serve.generate.session import STREAMED
from tests.serve.generate.test_equality import KINDS, V, draw, make, score_whole
from tests.small_model import make_config, make_model

PROMPTS = draw([3, 17, 9, 16, 1], seed=2)


@functools.cache
def make_generator(kind: str, **options) -> Generator:
    return Generator(make(kind), **options)


def go_on(model, prompt: np.ndarray, n: int) -> list[int]:
    """The most probable tokens one by one, the whole sequence anew for each."""
    row = prompt
    for _ in range(n):
        row = np.append(row, np.argmax(score_whole(model, np.pad(row, (0, 40 - len(row))))[len(row) - 1]))
    return row[len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["grouped keys", "window", "shared expert"])
def test_greedy_tokens_are_those_without_a_cache(kind):
    found = make_generator(kind).generate(PROMPTS, 20)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.tokens.tolist() == go_on(make(kind), prompt, 20)
        assert answer.finish == "length"


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_what_a_run_was_trained_through_is_not_needed_here(name):
    config = make_config(**{**KINDS["tied"], "attention": name, "compute_dtype": "bfloat16", "d_head": 8})
    generator = Generator(make_model(config, sizes=TEXT_SIZES), dtype="float32")
    plain = dataclasses.replace(config, attention="auto")
    expected = Generator(make_model(plain, sizes=TEXT_SIZES), dtype="float32").generate(PROMPTS, 5)
    for answer, other in zip(generator.generate(PROMPTS, 5), expected, strict=True):
        assert answer.tokens.tolist() == other.tokens.tolist()


def test_more_tokens_than_a_call_makes():
    generator = make_generator("grouped keys")
    n = 2 * CHUNK + 3
    (long,) = generator.generate(PROMPTS[:1], n)
    assert len(long.tokens) == n
    assert long.tokens[:20].tolist() == generator.generate(PROMPTS[:1], 20)[0].tokens.tolist()


def test_nothing_is_compiled_twice():
    """Neither for other prompts, lengths in the same buckets, temperatures and stop tokens, nor by the calls."""
    generator = Generator(make("tied"))
    generator.generate(draw([3, 9]), 12, Sampling(0.7, top_k=3), stop=(1,))
    assert generator.programs.n_compiled == 2
    other = draw([16, 2], seed=5), 15, Sampling(0.9, top_p=0.5, seed=3), (2, 3)
    assert count_compilations(lambda: generator.generate(*other)) == 0
    assert generator.programs.n_compiled == 2
    generator.generate(draw([17, 2]), 12, Sampling(0.7, top_k=3))
    assert generator.programs.n_compiled == 4  # a longer prompt in a larger cache
    generator.generate(draw([17, 2]), 30, Sampling(0.7, top_k=3))
    assert generator.programs.n_compiled == 4
    generator.generate(draw([3, 9]), 12)
    assert generator.programs.n_compiled == 6  # without a draw


def count_compilations(call) -> int:
    """Programs that JAX compiles, or reads from its cache, in a call."""
    found = []

    def listen(name: str, seconds: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(found)


def test_compilations_are_counted():
    assert count_compilations(lambda: jax.jit(lambda x: x * 3.25 + len("anew"))(jnp.ones(3))) > 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, top_k=5, top_p=0.8, seed=1)])
def test_a_prompt_goes_on_as_alone(sampling):
    generator = make_generator("shared expert")
    together = generator.generate(PROMPTS, 15, sampling)
    small = generator.generate(PROMPTS, 15, sampling, batch_size=2)
    for prompt, answer, other in zip(PROMPTS, together, small, strict=True):
        (alone,) = generator.generate([prompt], 15, sampling)
        assert alone.tokens.tolist() == answer.tokens.tolist() == other.tokens.tolist()


def test_equal_prompts_get_texts_of_their_own_and_seeds_repeat():
    generator = make_generator("tied")
    first, second = generator.generate([PROMPTS[0]] * 2, 15, Sampling(1.0))
    assert first.tokens.tolist() != second.tokens.tolist()
    again, _ = generator.generate([PROMPTS[0]] * 2, 15, Sampling(1.0))
    other = generator.generate([PROMPTS[0]], 15, Sampling(1.0, seed=1))[0]
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()


def test_stop_tokens_end_the_rows_they_are_in():
    generator = make_generator("grouped keys")
    free = [answer.tokens.tolist() for answer in generator.generate(PROMPTS, 20)]
    stop = (free[0][5], free[1][7])
    for whole, answer in zip(free, generator.generate(PROMPTS, 20, stop=stop), strict=True):
        end = next((i for i, token in enumerate(whole) if token in stop), None)
        assert answer.tokens.tolist() == whole[:end]
        assert answer.finish == ("length" if end is None else "stop")


def test_the_context_is_an_end():
    generator = Generator(make("grouped keys"), n_context=20)
    found = generator.generate(PROMPTS, 8)
    assert [len(answer.tokens) for answer in found] == [8, 3, 8, 4, 8]
    assert [answer.finish for answer in found] == ["length", "context", "length", "context", "length"]
    with pytest.raises(InputError, match="prompt 1: has 20 tokens; the model's context is 20"):
        generator.generate(draw([20]), 1)


def test_a_callback_is_told_all_tokens_in_parts():
    generator = make_generator("grouped keys")
    told: dict[int, list[list[int]]] = {i: [] for i in range(len(PROMPTS))}
    found = generator.generate(PROMPTS, 20, callback=lambda i, new: told[i].append(new))
    for i, answer in enumerate(found):
        assert [token for new in told[i] for token in new] == answer.tokens.tolist()
        assert max(map(len, told[i])) <= STREAMED


@pytest.mark.parametrize(
    ("prompts", "options", "line"),
    [
        ([[]], {}, "prompt 1: is empty"),
        ([[1], [V]], {}, f"prompt 2: {V} is no token"),
        ([[-1]], {}, "prompt 1: -1 is no token"),
        ([[1]], {"stop": (V,)}, "stop:"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(prompts, options, line):
    arguments = {"max_new_tokens": 3, **options}
    with pytest.raises(InputError, match=line):
        make_generator("grouped keys").generate([np.array(p, np.int32) for p in prompts], **arguments)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("grouped keys", (2, 1, 2)), ("window", (1, 1, 4)), ("shared expert", (2, 1, 2)), ("shared expert", (1, 5, 1))],
)
def test_on_a_mesh_the_tokens_are_the_same(kind, mesh):
    """Heads that the devices divide, and key heads that they do not; rows that are fewer than the devices."""
    on = make_mesh(*mesh)
    model = jax.tree.map(jax.device_put, make(kind), param_shardings(make(kind), on))
    generator = Generator(model, mesh=on)
    for matrix in generator.weights.layers[0].qkv:
        fits = matrix.w_XD.shape[1] % mesh[2] == 0  # inputs first
        assert matrix.w_XD.sharding.spec == PartitionSpec(None, "model" if fits else None)
    prompts = draw([3, 17, 9, 5, 21])
    for sampling in (Sampling(), Sampling(1.0, top_k=4)):
        found, wanted = (g.generate(prompts, 12, sampling) for g in (generator, make_generator(kind)))
        assert [a.tokens.tolist() for a in found] == [a.tokens.tolist() for a in wanted]
    compiled = generator.programs.n_compiled
    generator.generate(prompts, 12)
    assert generator.programs.n_compiled == compiled == 4
