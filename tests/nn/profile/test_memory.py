"""Memories against float64 loops over events; the pass over a packed row against one event after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerec.nn.profile import Event, MemorySizes, ProfileRequest, delta_memory, ema_memory, low_rank_memory, null
from moerec.nn.profile.memory import LEAST_HOURS, MOST_GAIN, MOST_HOURS, decay_rates
from moerec.nn.profile.recurrence import Writes, accumulate_elapsed, chunked_exclusive_scan, exclusive_scan
from moerec.types import NO_TIME
from tests.small_model import fill, worst_gap

SIZES = MemorySizes(d_model=6, n_aspects=2, n_scales=2, d_memory=3, field_sizes=(3, 2), rank=3)
MEMORIES = {"ema": ema_memory, "delta": delta_memory, "low_rank": low_rank_memory}
ALL = {**MEMORIES, "null": null}
LENGTHS = (1, 5, 1, 9, 4)
HOUR, YEAR = 3600, 31_557_600


@functools.cache
def make_params(name: str):
    if name == "null":
        return ()
    return fill(jax.eval_shape(lambda: MEMORIES[name](SIZES).init(jax.random.key(0))), stddev=0.7)


@functools.cache
def compile_states(name: str, chunk: int = 64):
    """Compiled once for all rows of a length: the states before each slot, of parameters, events and first slots."""
    return jax.jit(ALL[name](SIZES, chunk).prefix_states)


@functools.cache
def compile_update(name: str):
    return jax.jit(ALL[name](SIZES).update)


def draw_row(seed: int, lengths=LENGTHS, no_events: float = 0.0):
    """Events of users one after the other in a row: times from minutes to years apart, some of them unknown.

    A share of the slots may be no events; half of these have a time.
    """
    rng = np.random.default_rng(seed)
    first = np.concatenate([np.arange(n) == 0 for n in lengths])
    gaps = np.exp(rng.uniform(np.log(60), np.log(YEAR), len(first))).astype(np.int64)
    gaps[rng.random(len(first)) < 0.1] = 0
    parts = np.split(gaps, np.cumsum(lengths)[:-1])
    time = np.concatenate([rng.integers(-(2**30), 2**30) + np.cumsum(part) for part in parts])
    time = np.where(rng.random(len(first)) < 0.2, NO_TIME, time).astype(np.int32)
    x = rng.standard_normal((len(first), SIZES.d_model)).astype(np.float32)
    is_event = np.random.default_rng(seed + 1).random(len(first)) >= no_events
    return Event(x, np.where(is_event | (np.arange(len(first)) % 2 == 0), time, NO_TIME), is_event), first


def remember_by_hand(name: str, params, event: Event, first: np.ndarray):
    """The states before each slot, in float64: memory, last known time, number of events."""
    w = {
        key: np.asarray(value[...], np.float64) for key, value in vars(params).items() if hasattr(value, "get_metadata")
    }
    place = 1 / (1 + np.exp(-w["half_life_XX"].reshape(-1)))
    half_life = LEAST_HOURS * (MOST_HOURS / LEAST_HOURS) ** place
    if name == "low_rank":
        half_life = np.tile(half_life, SIZES.rank)
    out = []
    for t, (x, time) in enumerate(zip(np.asarray(event.x_D, np.float64), event.time, strict=True)):
        if first[t]:
            memory, last, n = np.zeros((len(half_life), 4)), None, 0
        out.append((memory.copy(), NO_TIME if last is None else last, n))
        x = x / np.sqrt(np.mean(x**2) + 1e-6) * np.asarray(params.norm.scale[...], np.float64)
        if name == "low_rank":
            gain = np.repeat([1, *(x @ w["key_DX"])], SIZES.n_scales)
        else:
            share = np.exp(x @ w["aspect_DX"])
            share /= share.sum()
            gain = np.repeat(2 / (1 + np.exp(-(x @ w["strength_D"]))) * share, SIZES.n_scales)
        if time != NO_TIME:
            hours = 0 if last is None else max(int(time) - int(last), 0) / HOUR
            memory = memory * 0.5 ** (hours / half_life)[:, None]
            last = time
        if not event.is_event[t]:
            continue
        if name == "delta":
            gain = MOST_GAIN * np.minimum(gain, 1)
            memory = memory * (1 - gain)[:, None]
        memory = memory + gain[:, None] * np.append(x @ w["value_DP"], 1)
        n += 1
    return out


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize(("chunk", "no_events"), [(3, 0.0), (8, 0.0), (64, 0.0), (8, 0.3)])
def test_a_packed_row_holds_the_states_of_each_user_alone(name, chunk, no_events):
    params = make_params(name)
    event, first = draw_row(1, no_events=no_events)
    states = compile_states(name, chunk)(params, event, first)
    for t, (memory, last, n) in enumerate(remember_by_hand(name, params, event, first)):
        np.testing.assert_allclose(states.memory_MP[t], memory, atol=3e-6 * max(np.abs(memory).max(), 1))
        assert (states.time[t], states.n_events[t]) == (last, n)


@pytest.mark.parametrize("no_events", [0.0, 0.3])
@pytest.mark.parametrize("name", [*MEMORIES, "null"])
def test_serving_keeps_the_state_that_training_saw(name, no_events):
    params, nobody = make_params(name), ALL[name](SIZES).init_user()
    event, first = draw_row(2, no_events=no_events)
    states = jax.device_get(compile_states(name)(params, event, first))
    update, state = compile_update(name), nobody
    for t in range(len(first)):
        state = nobody if first[t] else state
        np.testing.assert_allclose(states.memory_MP[t], state.memory_MP, atol=1e-5)
        assert states.n_events[t] == state.n_events
        if name != "null":
            assert states.time[t] == state.time
        state = update(params, state, jax.tree.map(lambda x, t=t: x[t], event))


@functools.cache
def compile_slopes(name: str):
    """Compiled: the gradients of the states' sum of squares in parameters and events' vectors, and the states."""
    prefix_states = ALL[name](SIZES, 3).prefix_states

    def total(params, x_D, event, first):
        states = prefix_states(params, event._replace(x_D=x_D), first)
        return jnp.sum(states.memory_MP**2), states

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", [*MEMORIES, "null"])
def test_a_control_slot_leaves_no_trace_in_the_profile(name):
    """States, counts and gradients are those of the row without it, whatever vector the slot has."""
    event, first = draw_row(6, (4, 3))
    start = np.flatnonzero(first)
    slot = Event(np.full((2, SIZES.d_model), 9.0, np.float32), np.full(2, NO_TIME, np.int32), np.zeros(2, bool))
    longer = Event(*(np.insert(column, start, new, axis=0) for column, new in zip(event, slot, strict=True)))
    is_new = np.isin(np.arange(9), start + np.arange(2))
    # Behind the row without them each stands alone, before which nothing is remembered: of one length, one program.
    plain = Event(*(np.append(column, new, axis=0) for column, new in zip(event, slot, strict=True)))
    params, pull = make_params(name), compile_slopes(name)
    (d_params, d_x), states = pull(params, plain.x_D, plain, np.append(first, [True, True]))
    # A sequence begins with its control slot.
    (more_d_params, more_d_x), more = pull(params, longer.x_D, longer, is_new)
    d_x, more_d_x, more = np.asarray(d_x)[:7], np.asarray(more_d_x), jax.device_get(more)
    for found, expected in zip(more, states, strict=True):
        np.testing.assert_allclose(found[~is_new], expected[:7], atol=1e-6, rtol=1e-6)
    assert not np.any(more.n_events[is_new])
    assert np.all(more.time[is_new] == NO_TIME)
    assert not np.any(more_d_x[is_new])
    scale = max(float(np.abs(d_x).max()), 1)
    np.testing.assert_allclose(more_d_x[~is_new], d_x, atol=1e-6 * scale)
    if name != "null":
        assert worst_gap(more_d_params, d_params) < 1e-5 * max(
            worst_gap(d_params, jax.tree.map(jnp.zeros_like, d_params)), 1
        )


@functools.cache
def compile_rest(name: str):
    """Compiled once for all cuts: slopes and states of a row from `cut` on, gone on with there, and of the whole row.

    What goes on stands first in a row of one length; behind it, as others, stand the slots before the cut.
    """
    personalizer, params = ALL[name](SIZES, 3), make_params(name)

    def go_on(event, first, cut):
        def step(state, part):
            t, one = part
            after = personalizer.update(params, state, one)
            return jax.tree.map(functools.partial(jnp.where, t < cut), after, state), t

        start, _ = jax.lax.scan(step, personalizer.init_user(), (jnp.arange(len(first)), event))
        rest, is_first = jax.tree.map(lambda leaf: jnp.roll(leaf, -cut, axis=0), (event, first))
        # The first slot of the row is one, whoever goes on in it.
        return personalizer.prefix_states(params, rest, is_first.at[0].set(True), start)

    def take_rest(event, first, cut):
        states = personalizer.prefix_states(params, event, first)
        return jax.tree.map(lambda leaf: jnp.roll(leaf, -cut, axis=0), states)

    def pull(run, event, first, cut):
        def total(x_D):
            states = run(event._replace(x_D=x_D), first, cut)
            is_rest = jnp.arange(len(first)) < len(first) - cut
            return jnp.sum(jnp.where(is_rest[:, None, None], states.memory_MP, 0) ** 2), states

        return jax.grad(total, has_aux=True)(event.x_D)

    return jax.jit(lambda *row: [pull(run, *row) for run in (go_on, take_rest)])


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(1, 11), st.sampled_from([*MEMORIES, "null"]))
def test_a_row_that_goes_on_from_a_state_is_the_rest_of_the_whole_one(seed, cut, name):
    """Values, and gradients with respect to what came before, of a first user cut anywhere and a second one."""
    event, first = draw_row(seed, (12, 4))
    (slopes, found), (expected_slopes, expected) = jax.device_get(compile_rest(name)(event, first, cut))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[: 16 - cut], b[: 16 - cut], atol=2e-5)
    np.testing.assert_allclose(slopes, expected_slopes, atol=1e-3 * max(np.abs(expected_slopes).max(), 1))


accumulate = jax.jit(accumulate_elapsed)


def draw_writes(seed: int, lengths, m: int = 3, p: int = 2) -> Writes:
    rng = np.random.default_rng(seed)
    event, first = draw_row(seed, lengths)
    n = len(first)
    keep = -rng.exponential(0.3, (n, m)) * rng.integers(0, 2, (n, m))
    arrays = (rng.exponential(0.01, m), keep, rng.random((n, m)), rng.standard_normal((n, p)))
    rate, keep, gain, value = (np.asarray(x, np.float32) for x in arrays)
    return Writes(accumulate(event.time, first), rate, keep, gain, value, first)


@functools.cache
def value_and_slopes(chunk: int | None):
    """Compiled: the states and their slopes, by chunks or (None) by the associative scan."""

    def total(rate, keep, gain, value, elapsed, first, cotangent):
        writes = Writes(elapsed, rate, keep, gain, value, first)
        out = exclusive_scan(writes) if chunk is None else chunked_exclusive_scan(writes, chunk)
        return jnp.sum(out * cotangent), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))


@settings(max_examples=20)
@given(st.integers(0, 999), st.lists(st.integers(1, 20), max_size=6), st.sampled_from([5, 40]))
def test_chunks_and_the_associative_scan_agree_in_value_and_gradient(seed, starts, chunk):
    edges = np.unique([0, *np.cumsum(starts)[np.cumsum(starts) < 37], 37])
    writes = draw_writes(seed, np.diff(edges))
    cotangent = np.random.default_rng(seed).standard_normal((37, 3, 2))
    operands = (*writes[1:5], writes.elapsed_T, writes.first_T, cotangent)
    (slopes, out), (expected_slopes, expected) = (value_and_slopes(c)(*operands) for c in (chunk, None))
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for a, b in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * max(float(np.abs(b).max()), 1))


def test_a_long_gap_costs_no_digits_afterwards():
    """A century at a rate of .7 an hour is a factor of e^-610,000, beside which seconds would drown in a sum.

    It is also more seconds than an int32 holds.
    """
    time = (np.array([0, 10, 100 * YEAR, 100 * YEAR + 60, 100 * YEAR + 7200]) - 2**31 + 5).astype(np.int32)
    first = np.arange(5) == 0
    value = np.ones((5, 1), np.float32)
    writes = Writes(
        accumulate(time, first), np.array([0.7], np.float32), np.zeros((5, 1), np.float32), value, value, first
    )
    last = 1 + np.exp(-0.7 / 60)
    for states in jax.jit(lambda w: (chunked_exclusive_scan(w), exclusive_scan(w)))(writes):
        np.testing.assert_allclose(states[:, 0, 0], [0, 1, 1 + np.exp(-0.7 * 10 / 3600), 1, last], rtol=1e-6)


@given(st.floats(-50, 50))
def test_half_lives_stay_within_their_bounds(x):
    params = make_params("ema")
    half_life = np.log(2) / decay_rates(jax.tree.map(lambda leaf: jnp.full_like(leaf, x), params))
    assert np.all((half_life > 0.999 * LEAST_HOURS) & (half_life < 1.001 * MOST_HOURS))


def test_without_events_a_memory_is_forgotten_at_its_half_life():
    nobody, update, params = ema_memory(SIZES).init_user(), compile_update("ema"), make_params("ema")
    event, _ = draw_row(3)
    state = update(params, nobody, Event(event.x_D[0], jnp.int32(0), True))
    half_life = float(np.log(2) / decay_rates(params)[1])
    later = Event(event.x_D[1], jnp.int32(round(half_life * HOUR)), True)
    after = np.asarray(update(params, state, later).memory_MP) - update(params, nobody, later).memory_MP
    np.testing.assert_allclose(after[1], state.memory_MP[1] / 2, rtol=1e-4)


def form_slots(personalizer, params, read_state) -> np.ndarray:
    """The memory slots as vectors `[M, D]`."""
    base_MD, mass_WD, read_PD = (part[:, 0] for part in personalizer.basis(params))
    written = read_state.mean_OP @ read_PD + read_state.evidence_O[:, None] * mass_WD
    return np.asarray(base_MD + np.concatenate([written, read_state.field_D[None]]))


@pytest.mark.parametrize("name", MEMORIES)
def test_a_condition_knows_what_is_known(name):
    personalizer, params = MEMORIES[name](SIZES), make_params(name)
    nobody = personalizer.init_user()
    event, _ = draw_row(4)
    somebody = compile_update(name)(params, nobody, Event(event.x_D[0], jnp.int32(100), True))
    nothing, fields = np.zeros(2, np.int32), np.array([2, 0], np.int32)

    def read_state(state, time, codes):
        return personalizer.read(params, state, ProfileRequest(jnp.int32(time), codes))

    np.testing.assert_array_equal(read_state(nobody, 200, nothing).summary_D, np.zeros(6))
    for known in (read_state(nobody, 200, fields), read_state(somebody, 200, nothing)):
        assert np.abs(known.summary_D).max() > 1e-3

    def slots(state, time):
        return form_slots(personalizer, params, read_state(state, time, nothing))

    late, later = (slots(somebody, t) for t in (200, 200 + 20 * YEAR))
    empty = slots(nobody, 200)
    assert np.abs(late - empty).max() > 0.05
    assert np.abs(later - empty).max() < 1e-3 * np.abs(late - empty).max()  # twenty years later nothing is left
    assert worst_gap(slots(somebody, NO_TIME), slots(somebody, 100)) < 1e-6


@pytest.mark.parametrize("name", MEMORIES)
def test_slots_are_means_of_what_was_written_by_hand(name):
    personalizer, params = MEMORIES[name](SIZES), make_params(name)
    w = {key: np.asarray(leaf[...], np.float64) for key, leaf in vars(params).items() if hasattr(leaf, "get_metadata")}
    event, first = draw_row(5, (7,))
    (memory, last, _) = remember_by_hand(name, params, event, first)[-1]
    hours = 30.0
    place = 1 / (1 + np.exp(-w["half_life_XX"]))
    fade = 0.5 ** (hours / (LEAST_HOURS * (MOST_HOURS / LEAST_HOURS) ** place))  # [A or 1, S]
    rows = memory.reshape(-1, 2, 4) * fade[..., None]
    mass, total = rows[..., -1], rows[..., :-1]
    if name == "low_rank":
        mass, total = np.repeat(mass[:1], 2, axis=0), np.einsum("AR,RSP->ASP", w["mix_XX"], total)
    written = total / (mass[..., None] + 1) @ w["read_PD"]
    written = written.reshape(4, -1) + np.log1p(mass).reshape(4, 1) * w["mass_MD"]
    fields = w["field_XD"][2] + w["field_XD"][3 + 1]
    expected = w["slot_MD"] + np.concatenate([written, fields[None]])
    state = jax.tree.map(lambda x: x[-1], compile_states(name)(params, event, first))
    request = ProfileRequest(jnp.int32(int(last) + int(hours * HOUR)), np.array([2, 1], np.int32))
    found = personalizer.read(params, state, request)
    np.testing.assert_allclose(form_slots(personalizer, params, found), expected, atol=1e-5)
    np.testing.assert_allclose(found.summary_D, expected.mean(axis=0), atol=1e-5)


def test_memory_of_the_training_pass_grows_linearly_with_the_slots():
    def temporaries(t: int) -> int:
        shapes = jax.eval_shape(lambda: draw_shapes(t))

        def total(keep, gain, value, elapsed, first):
            return jnp.sum(chunked_exclusive_scan(Writes(elapsed, jnp.ones(4), keep, gain, value, first)) ** 2)

        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def draw_shapes(t: int):
        return jnp.ones((t, 4)), jnp.ones((t, 4)), jnp.ones((t, 8)), jnp.ones(t, jnp.int32), jnp.ones(t, bool)

    small, large = temporaries(512), temporaries(4096)
    assert large < 10 * small
