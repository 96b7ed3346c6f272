"""Text behind events: with a cache it is what the model says of the whole stream at every position."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moerec.config import PersonalConfig
from moerec.errors import InputError
from moerec.serve.generate import Generator, Sampling
from moerec.types import EVENT, TOKEN, Batch
from tests.nn.test_text import KINDS, TABLE, TEXT, V, lay_mixed
from tests.small_model import make_config, make_model

PARTS = ["control", "events", "words", "events", "words"]
PERSONAL = PersonalConfig(layers=(0, 1), n_aspects=2, n_scales=1, d_memory=4)
MODELS = {
    **KINDS,
    "own services only": {"personal": dataclasses.replace(PERSONAL, other_services=False, prefix=False)},
    "personal with a window": {"personal": PERSONAL, "window": 7},
}


@functools.cache
def make(kind: str):
    return make_model(make_config(text=TEXT, **MODELS[kind]))


@jax.jit
def score(model, batch, catalog):
    return model.text_head.score(model.encode(batch, catalog).state_BTD, model.token_encoder)


def append(batch: Batch, token: int) -> Batch:
    """The stream with one word more, which repeats the last word in all else."""
    longer = jax.tree.map(lambda x: np.concatenate([x, x[:, -1:]], axis=1), batch)
    token_BT, position_BT = longer.token_BT.copy(), longer.position_BT.copy()
    token_BT[0, -1] = token
    position_BT[0, -1] += 1
    return longer._replace(token_BT=token_BT, position_BT=position_BT)


def fill_up(batch: Batch, n: int) -> Batch:
    """Padding behind the stream, so that one program does for all lengths."""
    padded = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, n - x.shape[1])] + [(0, 0)] * (x.ndim - 2)), batch)
    return padded


def go_on(model, batch: Batch, catalog, n: int) -> list[int]:
    """The most probable words one by one, the whole stream anew for each."""
    found = []
    for _ in range(n):
        n_slots = batch.kind_BT.shape[1]
        logits_V = np.asarray(score(model, fill_up(batch, 32), catalog))[0, n_slots - 1]
        order = np.sort(logits_V)
        assert order[-1] - order[-2] > 1e-4, "a near tie would make the comparison one of rounding"
        found.append(int(np.argmax(logits_V)))
        batch = append(batch, found[-1])
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_text_behind_events_is_that_of_the_whole_stream(kind):
    model = make(kind)
    catalog = model.bind(TABLE)
    batch = lay_mixed(1, PARTS)
    generator = Generator(model, catalog=catalog)
    (found,) = generator.generate_behind(fill_up(batch, 20), 12)
    assert found.tokens.tolist() == go_on(model, batch, catalog, 12)
    generator.generate_behind(lay_mixed(2, PARTS), 10)
    assert generator.programs.n_compiled == 2


def test_events_matter_to_the_text():
    """Or the test above shows nothing: other items before the same words, other words behind."""
    model = make("personal")
    catalog = model.bind(TABLE)
    batch = lay_mixed(1, PARTS)
    generator = Generator(model, catalog=catalog)
    (first,) = generator.generate_behind(batch, 12)
    item_BT = np.where(batch.kind_BT == EVENT, (batch.item_BT + 5) % 13, batch.item_BT)
    (second,) = generator.generate_behind(batch._replace(item_BT=item_BT), 12)
    assert first.tokens.tolist() != second.tokens.tolist()


def test_streams_of_unequal_lengths_are_as_alone():
    model = make("personal experts")
    generator = Generator(model, catalog=model.bind(TABLE))
    streams = [lay_mixed(3, PARTS), lay_mixed(4, ["events", "words"])]
    together = jax.tree.map(lambda a, b: np.concatenate([a, b]), *(fill_up(stream, 16) for stream in streams))
    for stream, answer in zip(streams, generator.generate_behind(together, 9), strict=True):
        (alone,) = generator.generate_behind(stream, 9)
        assert alone.tokens.tolist() == answer.tokens.tolist()


def test_what_cannot_be_gone_on_from_is_refused():
    model = make("dense")
    generator = Generator(model, catalog=model.bind(TABLE))
    with pytest.raises(InputError, match="prompt 1: its last slot has to be a word"):
        generator.generate_behind(lay_mixed(1, ["words", "events"]), 3)
    batch = lay_mixed(1, ["words"])
    two = batch._replace(segment_BT=np.array([[1, 1, 2]], np.int32))
    with pytest.raises(InputError, match="prompt 1: one sequence"):
        generator.generate_behind(two, 3)
    with pytest.raises(InputError, match="needs the catalogue"):
        Generator(model).generate_behind(batch, 3)
    assert (batch.kind_BT == TOKEN).all()
    assert batch.token_BT.max() < V


def test_many_streams_are_read_a_few_at_a_time_and_equal_ones_are_drawn_apart():
    model = make("dense")
    generator = Generator(model, catalog=model.bind(TABLE))
    one = fill_up(lay_mixed(1, PARTS), 16)
    batch = jax.tree.map(lambda x: np.repeat(x, 5, axis=0), one)
    told: dict[int, list[int]] = {}
    answers = generator.generate_behind(
        batch, 9, Sampling(1.0, seed=3), callback=lambda n, new: told.setdefault(n, []).extend(new), batch_size=2
    )
    assert [told[n] for n in range(5)] == [answer.tokens.tolist() for answer in answers]
    assert len({tuple(answer.tokens.tolist()) for answer in answers}) > 1
    whole = generator.generate_behind(batch, 9, Sampling(1.0, seed=3))
    assert [answer.tokens.tolist() for answer in whole] == [answer.tokens.tolist() for answer in answers]
    wrong = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, fill_up(lay_mixed(1, ["words", "events"]), 16))
    with pytest.raises(InputError, match="prompt 6: its last slot"):
        generator.generate_behind(wrong, 3, batch_size=2)
