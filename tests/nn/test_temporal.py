"""Calendar codes against the standard library, and their embedding."""

import datetime
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import TimeConfig
from moerec.nn.temporal import N_CODES, N_GAPS, N_WAVES, TimeEmbedding, calendar_codes, calendar_waves, last_times
from moerec.types import NO_TIME
from pallas_kernels.attention import find_bucket
from tests.nn import numpy_model as oracle
from tests.small_model import draw_times, fill

EPOCH = datetime.datetime(2000, 1, 1)
LIMITS = np.iinfo(np.int32)


def seconds(*moment: int) -> int:
    return int((datetime.datetime(*moment) - EPOCH).total_seconds())


def draw_all_times() -> np.ndarray:
    """Random times from 1990 to 2060, midnights and their eves, and the ends of what int32 holds."""
    rng = np.random.default_rng(0)
    times = rng.integers(seconds(1990, 1, 1), seconds(2060, 1, 1), 3000)
    midnights = times[:500] // 86_400 * 86_400
    return np.concatenate([times, midnights, midnights - 1, [0, -1, LIMITS.min + 1, LIMITS.max]]).astype(np.int32)


def test_calendar_codes_are_those_of_datetime():
    times = draw_all_times()
    codes = {name: np.asarray(code) for name, code in calendar_codes(jnp.asarray(times)).items()}
    expected = [oracle.calendar(time) for time in times]
    np.testing.assert_array_equal(codes["hour"], [e[0] for e in expected])
    np.testing.assert_array_equal(codes["weekday"], [e[1] for e in expected])
    np.testing.assert_array_equal(codes["month_day"], [oracle.month_day(time) for time in times])
    season = codes["season"]
    place = np.array([e[2] for e in expected])
    day = 24 / 365.25
    # Leap days shift the half-months by under a day.
    first, last = np.floor(place).astype(int) % 24, np.floor(place + 0.76 * day).astype(int) % 24
    assert np.all((season == first) | (season == last))
    assert np.mean(season == first) > 0.95
    assert set(season) == set(range(24))


def test_a_time_that_is_not_known_has_codes_of_its_own():
    codes = calendar_codes(jnp.asarray([NO_TIME]))
    assert {name: int(code[0]) for name, code in codes.items()} == N_CODES
    known = calendar_codes(jnp.asarray(draw_all_times()))
    assert {name: int(code.max()) + 1 for name, code in known.items()} == N_CODES
    assert all(int(code.min()) == 0 for code in known.values())


@pytest.mark.parametrize("names", [("hour",), ("weekday", "season"), tuple(N_CODES), ()], ids="+".join)
def test_waves_are_the_harmonics_of_each_cycle(names):
    times = np.append(draw_all_times(), NO_TIME)
    expected = [oracle.wave_features(time, {name: N_WAVES[name] for name in names}) for time in times]
    np.testing.assert_allclose(calendar_waves(jnp.asarray(times), names), expected, atol=2e-6)


def test_seven_days_are_told_apart_by_three_waves():
    """They and a constant span all functions of a weekday, as a table of seven rows does."""
    week = jnp.asarray([seconds(2024, 1, day) for day in range(1, 8)], jnp.int32)
    waves = np.asarray(calendar_waves(week, ("weekday",)))[:, :-1]
    assert np.linalg.matrix_rank(np.concatenate([waves, np.ones((7, 1))], axis=1), tol=1e-3) == 7


def test_last_times_stay_in_the_sequence_and_the_service():
    rng = np.random.default_rng(3)
    time = np.sort(draw_times(rng, 12)).reshape(2, 6).astype(np.int32)
    service = rng.integers(0, 3, (2, 6))
    position = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    found = np.asarray(last_times(time, service, position, 4))
    assert found.shape == (2, 6, 4)
    for b, t, z in np.ndindex(found.shape):
        own = [s for s in range(t - position[b, t], t + 1) if service[b, s] == z]
        assert found[b, t, z] == (time[b, own[-1]] if own else NO_TIME)


@pytest.mark.parametrize(
    ("earlier", "later", "code"),
    [
        (0, 0, 0),
        (5, 0, 0),  # the clock went back
        (0, 2000, 0),
        (0, 2200, 1),  # 1 + hours passes 2^(2/3) at 2,114 s
        (-100, 6 * 86_400, math.floor(1.5 * math.log2(145))),
        (0, 86_400 * 365 * 10, N_GAPS - 1),
        (seconds(1935, 1, 1), seconds(2065, 1, 1), N_GAPS - 1),  # more seconds than int32 holds
        (LIMITS.max, LIMITS.min + 1, 0),
        (NO_TIME, 0, N_GAPS),
        (0, NO_TIME, N_GAPS),
        (NO_TIME, NO_TIME, N_GAPS),
    ],
)
def test_gap_of(earlier, later, code):
    assert int(find_bucket(jnp.int32(earlier), jnp.int32(later), N_GAPS + 1)) == code


def test_gap_codes_are_the_log_of_the_hours():
    rng = np.random.default_rng(1)
    gaps = np.exp(rng.uniform(0, np.log(1.2e9), 2000)).astype(np.int64)
    earlier = rng.integers(-1_000_000_000, 900_000_000, 2000)
    codes = np.asarray(find_bucket(*(jnp.asarray(x, jnp.int32) for x in (earlier, earlier + gaps)), N_GAPS + 1))
    exact = 1.5 * np.log2(1 + gaps / 3600)
    allowed = [np.minimum(np.floor(exact + error), N_GAPS - 1) for error in (-1e-4, 1e-4)]
    assert np.all((codes == allowed[0]) | (codes == allowed[1]))
    assert set(codes) == set(range(N_GAPS))


@pytest.mark.parametrize(
    "config",
    [
        TimeConfig(),
        TimeConfig(month_day=True, service_gap=True),
        TimeConfig(kind="fourier", month_day=True, service_gap=True),
        TimeConfig(kind="fourier", hour=False, gap=False),
        TimeConfig(hour=False, weekday=False, season=False),
        TimeConfig(kind="fourier", hour=False, weekday=False, season=False, gap=False, service_gap=True),
    ],
    ids=("default", "all tables", "all waves", "some waves", "gap", "service gap"),
)
def test_embedding_is_the_sum_of_what_is_on_in_value_and_gradient(config):
    embedding = fill(jax.eval_shape(lambda: TimeEmbedding(jax.random.key(0), 4, 0.02, config, 2)))
    rng = np.random.default_rng(2)
    time = np.concatenate([draw_times(rng, 10), [NO_TIME, 0]]).astype(np.int32)
    since = np.concatenate([time[:9] - rng.integers(0, 10**8, 9), [NO_TIME, 0, 0]]).astype(np.int32)
    last = np.stack([since, np.where(np.arange(12) % 3 == 0, NO_TIME, since - 10**6)], axis=-1).astype(np.int32)
    shift = 3600 * rng.integers(-12, 13, 12).astype(np.int32)
    weights, cotangent = oracle.read_weights(embedding), rng.standard_normal((12, 4)).astype(np.float32)
    harmonics = {name: N_WAVES[name] for name in config.calendar}

    def expected(weights):
        return np.stack(
            [oracle.time_vector(weights, *x, harmonics) for x in zip(time, shift, since, last, strict=True)]
        )

    @jax.jit
    def pull(embedding, *times):
        def total(embedding):
            found = embedding(*times)
            return jnp.sum(found * cotangent), found

        return jax.grad(total, has_aux=True)(embedding)

    gradient, found = pull(embedding, time, shift, since, last)
    np.testing.assert_allclose(found, expected(weights), atol=1e-5)
    gradient = oracle.read_weights(gradient)
    oracle.assert_slopes(lambda w: np.sum(expected(w) * cotangent), weights, gradient, 1e-5)


def test_nothing_on_adds_nothing():
    nothing = TimeConfig(hour=False, weekday=False, season=False, gap=False)
    embedding = TimeEmbedding(jax.random.key(0), 4, 0.02, nothing)
    assert float(jnp.max(jnp.abs(embedding(*[jnp.zeros(3, jnp.int32)] * 3)))) == 0


def test_a_table_has_a_gradient_where_its_code_occurs():
    embedding = fill(jax.eval_shape(lambda: TimeEmbedding(jax.random.key(0), 4, 0.02, TimeConfig())))
    rng = np.random.default_rng(2)
    time = np.concatenate([draw_times(rng, 10), [NO_TIME, 0]]).astype(np.int32)
    since = np.concatenate([time[:9] - rng.integers(0, 10**8, 9), [NO_TIME, 0, 0]]).astype(np.int32)
    gradient = jax.jit(jax.grad(lambda e: jnp.sum(e(time, 0 * time, since))))(embedding)
    hours = [24 if t == NO_TIME else oracle.calendar(t)[0] for t in time]
    np.testing.assert_array_equal(gradient.hour[:, 0], np.bincount(hours, minlength=25))
    np.testing.assert_array_equal(gradient.gap[24], np.full(4, 2))  # one time and one start are not known


def test_tables_start_independent_of_each_other():
    embedding = TimeEmbedding(jax.random.key(0), 64, 1.0, TimeConfig(month_day=True, service_gap=True), 2)
    waves = TimeEmbedding(jax.random.key(0), 64, 1.0, TimeConfig(kind="fourier"))
    tables = [leaf.reshape(-1, 64)[:7] for leaf in (*jax.tree.leaves(embedding), waves.wave_XD[...])]
    assert len(tables) == 7
    for k, a in enumerate(tables):
        for b in tables[:k]:
            assert np.abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.25  # 448 draws: five standard errors
