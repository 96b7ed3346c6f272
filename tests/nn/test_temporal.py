"""Calendar codes against the standard library, and their embedding."""

import datetime
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.nn.temporal import N_GAPS, N_HOURS, N_SEASONS, N_WEEKDAYS, TimeEmbedding, calendar_codes
from moerec.shapes import NO_TIME
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
    hour, weekday, season = (np.asarray(code) for code in calendar_codes(jnp.asarray(times)))
    expected = [oracle.calendar(time) for time in times]
    np.testing.assert_array_equal(hour, [e[0] for e in expected])
    np.testing.assert_array_equal(weekday, [e[1] for e in expected])
    place = np.array([e[2] for e in expected])
    day = 24 / 365.25
    # Leap days shift the half-months by under a day.
    first, last = np.floor(place).astype(int) % 24, np.floor(place + 0.76 * day).astype(int) % 24
    assert np.all((season == first) | (season == last))
    assert np.mean(season == first) > 0.95
    assert set(season) == set(range(N_SEASONS))


def test_a_time_that_is_not_known_has_codes_of_its_own():
    codes = calendar_codes(jnp.asarray([NO_TIME]))
    assert [int(code[0]) for code in codes] == [N_HOURS, N_WEEKDAYS, N_SEASONS]
    known = [np.asarray(code) for code in calendar_codes(jnp.asarray(draw_all_times()))]
    assert [k.max() for k in known] == [N_HOURS - 1, N_WEEKDAYS - 1, N_SEASONS - 1]
    assert all(k.min() == 0 for k in known)


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


def test_embedding_is_the_sum_of_its_rows_in_value_and_gradient():
    embedding = fill(jax.eval_shape(lambda: TimeEmbedding(jax.random.key(0), 4, 0.02)))
    rng = np.random.default_rng(2)
    time = np.concatenate([draw_times(rng, 10), [NO_TIME, 0]]).astype(np.int32)
    since = np.concatenate([time[:9] - rng.integers(0, 10**8, 9), [NO_TIME, 0, 0]]).astype(np.int32)
    weights = oracle.read_weights(embedding)
    expected = [oracle.time_vector(weights, t, s) for t, s in zip(time, since, strict=True)]
    np.testing.assert_allclose(embedding(time, since), expected, atol=1e-6)
    gradient = jax.grad(lambda e: jnp.sum(e(time, since)))(embedding)
    hours = [24 if t == NO_TIME else oracle.calendar(t)[0] for t in time]
    np.testing.assert_array_equal(gradient.hour[:, 0], np.bincount(hours, minlength=25))
    np.testing.assert_array_equal(gradient.gap[24], np.full(4, 2))  # one time and one start are not known
