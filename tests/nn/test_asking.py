"""Every service asked: what an answer may depend on, and that asking one slot is what a whole pass gives."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import AskConfig, Config, DataConfig, MoEConfig, PersonalConfig
from moerec.nn.heads.answers import log_prob_all, log_prob_chosen
from moerec.nn.model import Predictor
from moerec.nn.moe.hypotheses import Hypotheses, ask_all, ask_one, followed_services
from moerec.tasks import Draws, NextEvent
from moerec.train.step import sum_losses
from moerec.types import NO_TIME, Catalog, NearItems
from tests.nn import numpy_model as oracle
from tests.small_model import SIZES, make_batch, make_config, make_model, make_table

Z = SIZES.n_services
TABLE = make_table()
OFFSETS = tuple(np.searchsorted(TABLE.service_I, np.arange(Z + 1)).tolist())
ASKED_SIZES = dataclasses.replace(SIZES, service_offsets=OFFSETS)
BATCH = make_batch(3, [[5, 4], [7], [1, 2, 3]], 9, control=True)
ASK = AskConfig(from_layer=1, analyser_layers=1, d_analyser=6)
EXPERTS = MoEConfig(layers=(1, 2), n_per_group=2, n_active=3, d_expert=4, tile=4)
PERSONAL = PersonalConfig(layers=(1, 2), n_aspects=2, d_memory=3)
KINDS = {
    "shared": {},
    "experts": {"moe": EXPERTS},
    "personal": {"moe": EXPERTS, "personal": PERSONAL, "pointer_time_bias": True},
    "window": {"window": 3, "personal": dataclasses.replace(PERSONAL, layers=(2,), other_services=False)},
    "repeats": {"repeat_bias": True, "window": 4},
    "near": {
        "text_pointer": True,
        "transition_pointer": True,
        "crossing_pointer": True,
        "moe": dataclasses.replace(EXPERTS, cross=False, n_active=2),
    },
}


def make_near(catalog: Catalog, seed: int, n: int = 3, crosses: bool = False) -> NearItems:
    """Random neighbors of the same service, or of others; some items have fewer, one has none."""
    rng, n_items = np.random.default_rng(seed), len(catalog.service_I)
    neighbor_IX = np.full((n_items, n), -1, np.int32)
    for item in range(n_items - 1):
        others = [i for i in range(n_items) if i != item]
        others = [i for i in others if (catalog.service_I[i] != catalog.service_I[item]) == crosses]
        chosen = rng.permutation(others)[: rng.integers(0, n + 1)]
        neighbor_IX[item, : len(chosen)] = chosen
    weight_IX = np.sort(rng.random((n_items, n)))[:, ::-1].astype(np.float32)
    return NearItems(neighbor_IX, np.where(neighbor_IX >= 0, weight_IX, 0))


NEAR = {
    "text": make_near(TABLE, 5),
    "transitions": make_near(TABLE, 6),
    "crossings": make_near(TABLE, 7, 5, crosses=True),
}
CATALOG = jax.tree.map(jnp.asarray, TABLE._replace(near=NEAR))


def make_asked(kind: str):
    config = make_config(n_layers=3, pointer="services", ask=ASK, **KINDS[kind])
    return make_model(config, 1, ASKED_SIZES)


def last_slots(batch) -> np.ndarray:
    segment = batch.segment_BT
    following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
    return np.flatnonzero((segment > 0) & (following != segment))


LAST = last_slots(BATCH)


@jax.jit
def encode_under(model, batch, catalog, hypothesis_BT):
    outputs = model.encode(batch, catalog, hypothesis_BT=hypothesis_BT)
    return outputs.state_BTD, outputs.pointers, outputs.log_domain_BTZ


@jax.jit
def ask_everybody(model, batch, catalog, flat_Q):
    below = model.read(batch, catalog)
    log_QZ = below.log_domain_BTZ.reshape(-1, Z)[flat_Q]
    return model.ask(batch, catalog, flat_Q, ask_all(log_QZ), below=below)


@pytest.mark.parametrize("kind", KINDS)
def test_asking_a_slot_is_what_a_pass_over_all_slots_gives(kind):
    """The request's slot alone is recomputed for each service, against a past that is computed once."""
    model = make_asked(kind)
    answers = ask_everybody(model, BATCH, CATALOG, LAST)
    followed = np.asarray(followed_services(BATCH, Z))
    assert np.all(followed.reshape(-1)[LAST] == -1)
    for z in range(Z):
        hypothesis = followed.copy()
        hypothesis.reshape(-1)[LAST] = z
        state, pointers, log_domain = encode_under(model, BATCH, CATALOG, hypothesis)
        np.testing.assert_allclose(answers.state_QXD[:, z], state.reshape(-1, 8)[LAST], atol=3e-5)
        assert sorted(pointers.near) == sorted(answers.pointers.near) == ([] if kind != "near" else sorted(NEAR))
        parts = [[x.log_weight_BTX, *jnp.moveaxis(x.part_BXTS, 1, 0)] for x in (answers.pointers, pointers)]
        for got, wanted in zip(*parts, strict=True):
            np.testing.assert_allclose(got[:, z], wanted.reshape(-1, wanted.shape[-1])[LAST], atol=3e-5)
        np.testing.assert_allclose(answers.log_domain_QZ, log_domain.reshape(-1, Z)[LAST], atol=1e-6)
    sums = jax.nn.logsumexp(log_prob_all(answers, model.bind(CATALOG), OFFSETS), axis=1)
    np.testing.assert_allclose(sums, 0, atol=2e-5)


def test_all_services_asked_at_once_or_by_choice_give_the_same():
    model = make_asked("near")
    catalog = model.bind(CATALOG)
    answers = ask_everybody(model, BATCH, CATALOG, LAST)
    everything = log_prob_all(answers, catalog, OFFSETS)
    np.testing.assert_allclose(log_prob_chosen(answers, catalog), everything, atol=1e-5)

    @jax.jit
    def ask_two(model, log_QZ):
        log_QX, service_QX = jax.lax.top_k(log_QZ, 2)
        two = Hypotheses(jax.nn.log_softmax(log_QX), service_QX, service_QX, service_QX)
        return model.ask(BATCH, CATALOG, LAST, two)

    two = ask_two(model, answers.log_domain_QZ)
    chosen = np.asarray(log_prob_chosen(two, catalog))
    kept = np.sort(np.argsort(-np.asarray(answers.log_domain_QZ), axis=1)[:, :2], axis=1)
    left = np.log(np.take_along_axis(np.exp(np.asarray(answers.log_domain_QZ)), kept, axis=1).sum(axis=1))
    is_kept = np.any(np.asarray(TABLE.service_I)[None, :, None] == kept[:, None], axis=-1)
    assert np.all(np.isneginf(chosen[~is_kept]))
    np.testing.assert_allclose(chosen[is_kept], (np.asarray(everything) - left[:, None])[is_kept], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_score_depends_on_a_target(kind):
    """Neither the target's item nor its service, wherever a batch could hold it."""
    model = make_asked(kind)
    catalog, queries = model.bind(CATALOG), jnp.asarray(LAST)
    predictor = Predictor(model, None, 1.3)
    score = jax.jit(lambda b: predictor.score(b, queries, catalog))
    before = score(BATCH)
    label = BATCH.targets["next_event"].label_BT
    for other in ((label + 1) % SIZES.n_items, (label + 5) % SIZES.n_items, 0 * label):
        target = BATCH.targets["next_event"]._replace(label_BT=other.astype(np.int32))
        np.testing.assert_array_equal(score(BATCH._replace(targets={"next_event": target})), before)
    np.testing.assert_array_equal(score(BATCH._replace(targets={})), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_sees_of_earlier_slots_only_services_known_by_then(kind):
    """A slot's hypothesis reaches no other slot at or before it, nor other sequences; and later ones it does reach."""
    model = make_asked(kind)
    followed = np.where(BATCH.segment_BT > 0, np.maximum(followed_services(BATCH, Z), 0), -1)
    before = encode_under(model, BATCH, CATALOG, followed)
    row, slot = 1, 3
    for z in range(Z):
        changed = followed.copy()
        changed[row, slot] = z
        after = encode_under(model, BATCH, CATALOG, changed)
        np.testing.assert_array_equal(after[2], before[2])  # the posterior is below all hypotheses
        if z == followed[row, slot]:
            continue
        # Where experts sort the slots, others may stand in another row of a product, which moves their last bits.
        tolerance = 1e-6 if model.config.moe.layers else 0
        is_same = np.max(np.abs(np.asarray(after[0] - before[0])), axis=-1) <= tolerance
        reached = np.zeros_like(is_same)
        reached[row, slot:7] = True
        assert np.all(is_same[~reached])
        assert not is_same[row, slot]
        assert not is_same[row, slot + 1]


@pytest.mark.parametrize("kind", ["experts", "personal", "near"])
def test_a_hypothesis_opens_its_own_group_and_cross_alone(kind):
    """Other services' experts change nothing of an answer, whatever they are."""
    model = make_asked(kind)
    moe = model.config.moe

    def state(model, z):
        one = jnp.full(len(LAST), z)
        return model.ask(BATCH, CATALOG, LAST, ask_one(one)).state_QXD

    ask = jax.jit(state)
    for z, other in itertools.product(range(Z), range(Z + moe.cross)):
        rows = slice(other * moe.n_per_group, (other + 1) * moe.n_per_group)
        changed = jax.tree_util.tree_map_with_path(
            lambda path, x, rows=rows: x.at[:, rows].add(0.5) if "_EDF" in str(path) or "_EFD" in str(path) else x,
            model,
        )
        # The past's slots asked others: only a sequence of a single slot has none.
        alone = [q for q, flat in enumerate(LAST) if BATCH.position_BT.reshape(-1)[flat] == 0]
        assert alone
        moved = np.abs(np.asarray(ask(changed, z) - ask(model, z)))[alone].max()
        assert (moved > 1e-3) == (other in (z, Z)), (z, other)


def read_near(name: str | None, item: int, head, z: int) -> tuple[float, list[int], np.ndarray]:
    """How much a pointer knows of an event's item, and the items and shares that it gives to."""
    if name is None:
        return 1.0, [item], np.ones(1)
    items, weights = (np.asarray(column[item]) for column in NEAR[name])
    near = [int(j) for j in items if j >= 0]
    if not near:
        return 0.0, [], np.zeros(0)
    weights = weights[: len(near)].astype(np.float64)
    if name == "crossings":
        is_asked = [TABLE.service_I[j] == z for j in near]
        near, weights = [j for j, x in zip(near, is_asked, strict=True) if x], weights[is_asked]
        if not near:
            return 0.0, [], np.zeros(0)
    if name == "text":
        return 1.0, near, oracle.softmax(head["sharpness_Z"][z] * weights)
    return weights.sum() / (weights.sum() + 4), near, weights / weights.sum()


def answer_by_hand(w, model, state, row: int, slot: int, z: int) -> np.ndarray:
    """`[I]`, p(item | service z) of a slot whose state is given, in loops and float64."""
    service_I = np.asarray(TABLE.service_I)
    head, config = oracle.part(w, "head.aggregator"), model.config
    items = [oracle.item_vector(oracle.part(w, "item_encoder"), i, TABLE, 1e-6) for i in range(SIZES.n_items)]
    own = service_I == z
    softmax = np.zeros(SIZES.n_items)
    x = oracle.embed(w, BATCH, TABLE, config, SIZES.context_sizes, row)
    seen = [s for s in range(slot + 1) if BATCH.segment_BT[row, s] == BATCH.segment_BT[row, slot]]
    if config.window:
        seen = [s for s in seen if s > slot - config.window]
    score = np.array(items) @ state + w["head.bias_I"]
    if config.repeat_bias:
        had = [int(BATCH.item_BT[row, s]) for s in seen if BATCH.service_BT[row, s] < Z]
        score[list(set(had))] += w["head.repeat_Z"][z]
    softmax[own] = oracle.softmax(score[own])
    around = [s for s in seen if BATCH.service_BT[row, s] not in (z, Z)]
    own_events = [s for s in seen if BATCH.service_BT[row, s] == z]
    logits = head["gate_bias"][z] + state @ head["weight_ZDX"][z]
    parts = [softmax]
    for x_place, group in enumerate([z, Z, Z + 1, Z + 2, Z + 3][: len(logits) - 1]):
        name, p = [None, None, "crossings", "text", "transitions"][x_place], np.zeros(SIZES.n_items)
        open_events = around if name == "crossings" else own_events
        # Of a pointer to neighbors counts what it finds among all events, wherever they are.
        events = open_events if name is None else sorted(around + own_events)
        read = {s: read_near(name, int(BATCH.item_BT[row, s]), head, z) for s in open_events}
        if not any(known for known, _, _ in read.values()):
            logits[x_place + 1] = -np.inf
        else:
            place, theta = BATCH.position_BT[row], config.rope_theta
            query = oracle.rope(state @ head["query_DGH"][:, group], place[slot], theta)
            keys = [oracle.rope(x[s] @ head["key_DGH"][:, group], place[s], theta) for s in events]
            weight = np.array([query @ key for key in keys]) / np.sqrt(len(query))
            if "time_gate_biasX" in head:
                asked_at = BATCH.request.time_BT[row, slot]
                times = [(BATCH.time_BT[row, s], asked_at) for s in events]
                buckets = [24 if NO_TIME in pair else oracle.gap(*pair) for pair in times]
                weight += head["time_gate_biasX"][z, x_place][buckets]
            if name is not None:  # the last one has place 0: of its service, or of all
                after = [
                    place[slot] - place[s]
                    if name == "crossings"
                    else sum(BATCH.service_BT[row, s] == BATCH.service_BT[row, other] for other in events if other > s)
                    for s in events
                ]
                weight += head["slope_ZX"][z, x_place - 2] * np.array(after)
            attention = dict(zip(events, oracle.softmax(weight), strict=True))
            evidence = sum(attention[s] * read[s][0] for s in open_events)
            logits[x_place + 1] += np.log(evidence)
            for s in open_events:
                known, items, shares = read[s]
                p[items] += attention[s] * known / evidence * shares
        parts.append(p)
    return oracle.softmax(logits) @ np.array(parts)


@pytest.mark.parametrize("kind", ["shared", "near", "personal", "repeats"])
def test_answers_are_those_of_loops_over_events_and_items(kind):
    model = make_asked(kind)
    answers = ask_everybody(model, BATCH, CATALOG, LAST)
    log_p = log_prob_all(answers, model.bind(CATALOG), OFFSETS)
    w = oracle.read_weights(model)
    for q, flat in enumerate(LAST):
        expected = np.zeros(SIZES.n_items)
        for z in range(Z):
            state = np.asarray(answers.state_QXD[q, z], np.float64)
            p = answer_by_hand(w, model, state, *divmod(int(flat), BATCH.item_BT.shape[1]), z)
            expected += np.exp(np.float64(answers.log_service_QX[q, z])) * p
        np.testing.assert_allclose(np.exp(log_p[q]), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["experts", "near", "repeats"])
def test_the_loss_of_a_target_is_its_log_probability_among_all_answers(kind):
    """What training minimises, under the target's hypothesis, is what evaluation gives, having asked everybody."""
    model, task = make_asked(kind), NextEvent()
    config = Config(model=model.config, data=DataConfig(text_neighbors=3, transition_neighbors=3, crossing_neighbors=5))
    catalog = model.bind(CATALOG)
    log_p = log_prob_all(ask_everybody(model, BATCH, CATALOG, LAST), catalog, OFFSETS)
    followed = np.asarray(followed_services(BATCH, Z))

    @jax.jit
    def loss(item):
        target = BATCH.targets["next_event"]._replace(label_BT=jnp.full(BATCH.item_BT.shape, item))
        weight = jnp.zeros(BATCH.item_BT.size)
        hypothesis = jnp.asarray(followed).reshape(-1).at[LAST].set(CATALOG.service_I[item]).reshape(followed.shape)
        outputs = model.encode(BATCH, CATALOG, hypothesis_BT=hypothesis)

        def of_slot(flat):
            own = target._replace(weight_BT=weight.at[flat].set(1.0).reshape(followed.shape))
            batch = BATCH._replace(targets={"next_event": own})
            return task.loss(model, outputs, batch, catalog, Draws(), config).total

        return jnp.stack([of_slot(flat) for flat in LAST])

    for item in range(SIZES.n_items):
        np.testing.assert_allclose(-loss(item), log_p[:, item], rtol=1e-4, atol=1e-4)


def test_the_analyser_learns_by_its_own_loss_alone_and_hypotheses_by_the_answers():
    model = make_asked("personal")
    config = Config(model=model.config)

    def total(model, part):
        sums = sum_losses(model, BATCH, CATALOG, [NextEvent()], {"next_event": Draws()}, config).tasks["next_event"]
        return sums.parts[part] if part else sums.total

    gradient, of_analyser = (jax.jit(jax.grad(total), static_argnums=1)(model, part) for part in ("", "analyser"))
    for name in ("hypothesis_ZD", "analyser"):
        for leaf in jax.tree.leaves(getattr(gradient, name)):
            assert np.abs(leaf).max() > 0
    for own, alone in zip(*(jax.tree.leaves(x.analyser) for x in (gradient, of_analyser)), strict=True):
        np.testing.assert_allclose(own, alone, rtol=1e-4, atol=1e-6)
    assert not np.any(of_analyser.hypothesis_ZD[...])


class Elsewhere(NextEvent):
    """A task that counts slots under other domains than the next event's."""

    name = "elsewhere"

    def domains(self, target, catalog):
        return jnp.zeros_like(target.label_BT)


def test_slots_ask_the_service_of_the_next_event_whatever_other_tasks_count_them_under():
    model = make_asked("shared")
    batch = BATCH._replace(targets=dict.fromkeys(("elsewhere", "next_event"), BATCH.targets["next_event"]))
    loss = [
        sum_losses(model, batch, CATALOG, tasks, {task.name: Draws() for task in tasks}, Config(model=model.config))
        for tasks in ([NextEvent()], [Elsewhere(), NextEvent()])
    ]
    one, both = (float(sums.tasks["next_event"].total) for sums in loss)
    assert one == pytest.approx(both, rel=1e-6)
