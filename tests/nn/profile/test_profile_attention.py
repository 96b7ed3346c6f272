"""The model that reads a profile: neutral at first, causal, packed as alone, equal to loops over slots and heads."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import ModelConfig, MoEConfig, PersonalConfig
from moerec.errors import InputError
from moerec.nn.attention import ProfileAttention, ProfileContext, rotate
from moerec.nn.block import split_layers
from moerec.nn.model import SequenceModel
from moerec.nn.profile import Basis, ProfileMemory
from moerec.nn.temporal import N_GAPS
from moerec.types import EVENT, NO_TIME
from pallas_kernels.attention import attend_few, attend_prefix
from tests.nn import numpy_model as oracle
from tests.small_model import (
    SIZES,
    assert_packed_is_alone,
    fill,
    lay,
    make_batch,
    make_config,
    make_model,
    make_sequence,
    make_table,
    replace_slot,
    with_request,
    worst_gap,
)

TABLE = make_table()
ON_DEVICE = jax.tree.map(jnp.asarray, TABLE)
SMALL = {"n_aspects": 3, "n_scales": 2, "d_memory": 4, "chunk": 4}
BARE = {"item_text": False, "event_time": False, "request_time": False, "request_context": False}
MIXED = MoEConfig(layers=(1,), n_per_group=1, d_expert=8, tile=8)
LENGTHS = [[5, 3, 2], [10, 1]]


def make_personal(moe: MoEConfig = MIXED, window: int = 0, **fields) -> ModelConfig:
    personal = PersonalConfig(layers=(1,), **{**SMALL, **fields})
    return make_config(moe=moe, window=window, tie_items=False, personal=personal)


def encode(model, batch):
    return encode_with(model, batch, TABLE)


@jax.jit
def encode_with(model, batch, table):
    return model.encode(batch, table)


def test_a_librarys_kernel_is_for_the_layers_without_biases():
    config = make_personal()
    batch = make_batch(0, LENGTHS, 12)
    states = [
        encode(make_model(dataclasses.replace(config, attention=name)), batch) for name in ("reference", "splash")
    ]
    for expected, found in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("memories", "moe"), [(("null", "delta", "low_rank"), MoEConfig()), (("ema",), MIXED)])
def test_at_first_nothing_is_personal(memories, moe):
    """So that an imported base model keeps its abilities: the same key gives the same weights, and the same states."""
    configs = {memory: make_personal(moe, memory=memory) for memory in memories}
    plain = dataclasses.replace(configs[memories[0]], personal=PersonalConfig())

    @jax.jit  # one program: what models have in common is compiled once
    def start(batch):
        return {
            name: SequenceModel(jax.random.key(0), config, SIZES).encode(batch, ON_DEVICE)
            for name, config in {**configs, "plain": plain}.items()
        }

    outputs = start(make_batch(3, LENGTHS, 12))
    for memory in memories:
        found = outputs[memory]
        np.testing.assert_allclose(found.state_BTD, outputs["plain"].state_BTD, atol=2e-6, err_msg=memory)
        assert (found.relevance_BTM is None) == (memory == "null")


@functools.cache
def make_sequences(control: bool = False) -> list[list[dict]]:
    rng = np.random.default_rng(2)
    return [[make_sequence(rng, n, control=control) for n in row] for row in LENGTHS]


def lay_packed(rows: list[list[dict]]):
    """The sequences in two rows, and rows of padding: as many as there are sequences, so that shapes are the same."""
    return lay([*rows, *[[]] * 3], 12)


@pytest.mark.parametrize(("memory", "control"), [("ema", False), ("delta", False), ("low_rank", False), ("ema", True)])
def test_packed_users_have_the_states_of_each_alone(memory, control):
    model = make_model(make_personal(memory=memory))
    rows = make_sequences(control)
    packed = encode(model, lay_packed(rows))
    alone = encode(model, lay([[sequence] for row in rows for sequence in row], 12))
    assert_packed_is_alone(packed.state_BTD, alone.state_BTD, rows, atol=2e-5)
    assert_packed_is_alone(packed.relevance_BTM, alone.relevance_BTM, rows, atol=2e-5)


def test_a_slot_reaches_only_later_states_of_its_user():
    model = make_model(make_personal())
    batch = lay_packed(make_sequences())
    before = np.asarray(encode(model, batch).state_BTD)
    b, t = 0, 2
    reached = np.zeros(batch.item_BT.shape, bool)
    reached[b, t:5] = True
    changes = {
        "item_BT": (batch.item_BT[b, t] + 1) % SIZES.n_items,
        "action_BT": (batch.action_BT[b, t] + 1) % SIZES.n_actions,
        "time_BT": 123_456_789,
        "request.time_BT": 223_456_789,
        "request.field_BTY": (batch.request.field_BTY[b, t] + 1) % np.array(SIZES.field_sizes),
    }
    for name, value in changes.items():
        after = np.asarray(encode(model, replace_slot(batch, name, (b, t), value)).state_BTD)
        np.testing.assert_array_equal(after[~reached], before[~reached], err_msg=name)
        # A static field is read where it stands; what a slot did is read by all that follow.
        changed = np.abs(after - before)[reached].max(axis=-1) > 1e-6
        assert changed[0], name
        assert changed.all() or name in ("request.field_BTY", "request.time_BT"), name


def test_what_lies_before_the_window_is_still_remembered():
    """The only layer sees two slots, and knows the third-last event through the profile alone."""
    batch = lay([make_sequences()[1][:1]], 12)
    hours_BT = 3600 * np.arange(12, dtype=np.int32)[None]
    batch = with_request(batch._replace(time_BT=hours_BT), time_BT=hours_BT + 1800)
    item_BT = batch.item_BT.copy()
    item_BT[0, 1] = (item_BT[0, 1] + 1) % SIZES.n_items
    for memory, remembers in (("null", False), ("ema", True), ("delta", True), ("low_rank", True)):
        personal = PersonalConfig(layers=(0,), memory=memory, **SMALL)
        model = make_model(make_config(n_layers=1, window=2, personal=personal, **BARE))
        states = [encode(model, batch._replace(item_BT=x)).state_BTD for x in (batch.item_BT, item_BT)]
        gap_T = np.abs(states[0] - states[1])[0, :10].max(axis=-1)
        assert gap_T[1:3].min() > 1e-5
        assert (gap_T[3:].min() > 1e-6) if remembers else (gap_T[3:].max() == 0)


@pytest.mark.parametrize(
    ("switch", "name"),
    [
        ("read", "profile_router.out_DD"),
        ("prefix", "attention.personal.gate_N"),
        ("query_scale", "attention.personal.query_scale_DNH"),
        ("time_bias", "attention.personal.time_bias_NX"),
        ("pair_bias", "attention.personal.pair_NZZ"),
        ("route", "ffn.w_profile_EM"),
    ],
)
def test_each_part_has_its_switch(switch, name):
    def names(config):
        shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, SIZES))
        return set(oracle.read_weights(jax.tree.map(lambda x: np.zeros(x.shape), shapes)))

    on, off = make_personal(), make_personal(**{switch: False})
    assert any(found.endswith(name) for found in names(on) - names(off))


def draw_slots(rng, shape: tuple[int, ...], m: int, d: int, p: int = 3) -> ProfileMemory:
    shared = Basis(*(rng.standard_normal((rows, 1, d)) for rows in (m, m - 1, p)))
    own = (
        rng.standard_normal((*shape, m - 1, p)),
        rng.standard_normal((*shape, m - 1)),
        rng.standard_normal((*shape, 1, d)),
    )
    return ProfileMemory(shared, *own)


def form_slots(slots: ProfileMemory):
    """The memory slots as vectors `[X, M, D]`; works on JAX's arrays and numpy's."""
    base, mass, read = (part[:, 0] for part in slots.basis)
    written = slots.mean_XOP @ read + slots.evidence_XO[..., None] * mass
    concatenate = base.__array_namespace__().concatenate
    return base + concatenate([written, slots.field_XNH], axis=-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("projected", [True, False])
def test_attention_to_the_parts_of_slots_is_attention_to_the_slots(dtype, projected):
    """In value and all gradients: the slots as vectors, `[B, T, M, 1, D]`, or projected to each of three heads."""
    rng = np.random.default_rng(3)
    slots = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw_slots(rng, (2, 5), 7, 6))
    n, h = (3, 4) if projected else (1, 6)
    query = jnp.asarray(rng.standard_normal((2, 5, n, h)), dtype)
    bias = jnp.asarray(rng.standard_normal((2, 5, 7)), jnp.float32)
    maps = jnp.asarray(rng.standard_normal((2, 6, 3, 4)) / 2, jnp.float32)
    weights = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, n, h), (2, 5, n))]

    def by_parts(slots, query, bias, maps):
        keys, values = (slots.project(w, dtype) if projected else slots for w in maps)
        read, lse = attend_few(keys.score(query) * h**-0.5 + bias[:, :, None], values.read)
        return read.astype(dtype), lse

    def by_vectors(slots, query, bias, maps):
        vectors = form_slots(slots)
        each = (jnp.einsum("BTMD,DNH->BTMNH", vectors, w) if projected else vectors[:, :, :, None] for w in maps)
        return attend_prefix(query, *(x.astype(dtype) for x in each), bias)

    def pull(attend):
        def total(*inputs):
            return sum(jnp.sum(w * x) for w, x in zip(weights, attend(*inputs), strict=True))

        pulled = jax.jit(lambda *inputs: (attend(*inputs), jax.grad(total, argnums=(0, 1, 2, 3))(*inputs)))
        return pulled(slots, query, bias, maps)

    tolerance = {"float32": 5e-5 if projected else 2e-5, "bfloat16": 0.1}[dtype]
    found, expected = pull(by_parts), pull(by_vectors)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance, rtol=tolerance)


def test_no_slot_and_no_query_is_as_wide_as_all_heads_times_the_model():
    """Of what attention to the parts of slots holds, backward included, the greatest is what it is given or returns."""
    b, t, n, h, d, m = 2, 16, 4, 4, 64, 7
    slots = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw_slots(np.random.default_rng(3), (b, t), m, d))
    query, maps = jnp.ones((b, t, n, h)), jnp.ones((2, d, n, h))

    def total(slots, query, maps):
        keys, values = (slots.project(w, jnp.float32) for w in maps)
        read, lse = attend_few(keys.score(query), values.read)
        return jnp.sum(read**2) + jnp.sum(lse**2)

    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(slots, query, maps))
    sizes = [np.prod([int(x) for x in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", jaxpr)]
    assert max(sizes) == max(b * t * d, maps.size)
    assert max(sizes) < b * t * n * d


def test_slots_without_fields_are_those_with_nothing_in_them():
    slots = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw_slots(np.random.default_rng(4), (2, 5), 7, 6))
    nothing = slots._replace(field_XNH=jnp.zeros_like(slots.field_XNH))
    query, w, weight = jnp.ones((2, 5, 3, 4)), jnp.ones((6, 3, 4)), jnp.ones((2, 5, 3, 7))
    with_zeros, without = (x.project(w, jnp.float32) for x in (nothing, slots._replace(field_XNH=None)))
    np.testing.assert_array_equal(without.score(query), with_zeros.score(query))
    np.testing.assert_array_equal(without.read(weight), with_zeros.read(weight))


SEGMENT_9 = np.array([1, 1, 1, 2, 2, 2, 2, 2, 0], np.int32)


def attend_by_hand(w, q, k, v, view: ProfileContext, window: int, own_only: bool):
    """One row, one head and slot at a time, in float64; slots' places are their order in the row."""
    t, n, h = q.shape
    out, all_slots = np.zeros_like(q), form_slots(view.slots)
    for i, head in np.ndindex(t, n):
        query = q[i, head] * (1 + view.summary_BTD[0, i] @ w["query_scale_DNH"][:, head])
        gate = 1 + view.summary_BTD[0, i] @ w["pair_gate_DN"][:, head]
        logits, values = [], []
        for j in range(i + 1):
            service_i, service_j = view.service_BT[0, i], view.service_BT[0, j]
            hidden = SEGMENT_9[i] != SEGMENT_9[j] or i - j >= window
            if hidden or (own_only and service_j not in (service_i, SIZES.n_services)):
                continue
            times = int(view.time_BT[0, j]), int(view.time_BT[0, i])
            gap = max(times[1] - times[0], 0) / 3600
            bucket = N_GAPS if NO_TIME in times else min(int(np.floor(1.5 * np.log2(1 + gap))), N_GAPS - 1)
            bias = w["time_bias_NX"][head, bucket]
            if max(service_i, service_j) < SIZES.n_services:  # pairs of services alone have a bias
                bias += gate * w["pair_NZZ"][head, service_i, service_j]
            turned = oracle.rope(k[j, head // (n // k.shape[1])], j - i, 10_000.0)
            logits.append(query @ turned * h**-0.5 + bias)
            values.append(v[j, head // (n // v.shape[1])])
        plain = softmax(logits) @ np.array(values)
        slots = all_slots[0, i]
        more = slots @ w["key_DNH"][:, head] @ query * h**-0.5 + view.log_relevance_BTM[0, i]
        values += [slot @ w["value_DNH"][:, head] for slot in slots]
        joined = softmax([*logits, *more]) @ np.array(values)
        out[i, head] = plain + np.tanh(w["gate_N"][head]) * (joined - plain)
    return out


def softmax(x) -> np.ndarray:
    e = np.exp(np.array(x) - np.max(x))
    return e / e.sum()


@jax.jit
def pull_attention(module, inputs, time_BT, service_BT, log_relevance_BTM, cotangent):
    """Gradients of the module and of the queries, keys, values, summary and parts of the slots; and the output."""

    def total(module, q, key, value, summary, *slots):
        # Times that do not rise within a user, too: the gap is then none.
        parts = ProfileMemory(Basis(*slots[:3]), *slots[3:])
        seen = ProfileContext(time_BT, service_BT, parts, log_relevance_BTM, summary)
        place = 5 + np.arange(len(SEGMENT_9), dtype=np.int32)[None]  # from anywhere: distances alone matter
        q, key, value = (x.astype(jnp.float32) for x in (q, key, value))
        q = module.scale(q, seen)
        out = module(q, rotate(q, place, 10_000.0), rotate(key, place, 10_000.0), value, SEGMENT_9[None], seen)
        return jnp.sum(out * cotangent), out

    return jax.grad(total, argnums=tuple(range(1 + len(inputs))), has_aux=True)(module, *inputs)


@pytest.mark.parametrize("no_events", [False, True], ids=["events", "slots that are no event"])
@pytest.mark.parametrize("own_only", [False, True])
def test_attention_is_that_of_loops_in_value_and_gradient(own_only, no_events):
    config = make_personal(window=4, other_services=not own_only)
    module = fill(jax.eval_shape(lambda: ProfileAttention(jax.random.key(0), config, SIZES.n_services)))
    rng = np.random.default_rng(1)
    t, n, k, h, d, m = 9, config.n_heads, config.n_kv_heads, config.d_head, config.d_model, 3
    time = np.cumsum(rng.integers(0, 10**6, t)) * rng.integers(0, 2, t)
    view = ProfileContext(
        time_BT=np.where(rng.random((1, t)) < 0.2, NO_TIME, time).astype(np.int32),
        service_BT=np.where(
            no_events & (np.arange(t) % 3 == 0), SIZES.n_services, rng.integers(0, SIZES.n_services, (1, t))
        ).astype(np.int32),
        slots=draw_slots(rng, (1, t), m, d),
        log_relevance_BTM=np.log(rng.dirichlet(np.ones(m), (1, t))),
        summary_BTD=rng.standard_normal((1, t, d)),
    )
    q, key, value = (rng.standard_normal((1, t, heads, h)) for heads in (n, k, k))
    cotangent = rng.standard_normal((1, t, n, h))

    inputs = (q, key, value, view.summary_BTD, *view.slots.basis, *view.slots[1:])
    gradients, out = pull_attention(module, inputs, view.time_BT, view.service_BT, view.log_relevance_BTM, cotangent)

    def by_hand(w):
        slots = ProfileMemory(Basis(w["base"], w["mass"], w["slot_read"]), w["mean"], w["evidence"], w["field"])
        seen = view._replace(slots=slots, summary_BTD=w["summary"])
        return attend_by_hand(w, w["q"][0], w["k"][0], w["v"][0], seen, 4, own_only)

    names = ("q", "k", "v", "summary", "base", "mass", "slot_read", "mean", "evidence", "field")
    weights = {**oracle.read_weights(module), **dict(zip(names, inputs, strict=True))}
    np.testing.assert_allclose(out[0], by_hand(weights), atol=2e-5)
    slopes = {**oracle.read_weights(gradients[0]), **dict(zip(names, map(np.asarray, gradients[1:]), strict=True))}
    oracle.assert_slopes(lambda w: np.sum(by_hand(w) * cotangent[0]), weights, slopes, 2e-4)


@pytest.mark.parametrize("memory", ["ema", "delta", "low_rank", "null"])
def test_a_control_slot_changes_no_profile(memory):
    """What the model reads of the profile at each event, counts included, is as without the slot; so are gradients."""
    model = make_model(make_personal(MoEConfig(), memory=memory))
    hours = 3600 * np.arange(5)
    with_slot = [
        {**user, "time": np.where(user["kind"] == EVENT, hours[:n], NO_TIME), "request.time": hours[:n] + 1800}
        for user, n in zip(make_sequences(control=True)[0], LENGTHS[0][:2], strict=False)
    ]
    without = [{name: column[1:] for name, column in user.items()} for user in with_slot]
    for user in without:
        user["position"] = user["position"] - 1
    batches = [lay([[user] for user in users], 5) for users in (with_slot, without)]

    @jax.jit
    def pull(model, batch, skip):
        def total(model):
            profile = model.read_profiles(batch, ON_DEVICE)
            events = [
                jax.tree.map(lambda x, b=b, n=n: jax.lax.dynamic_slice_in_dim(x[b], skip, n), profile)
                for b, n in ((0, 4), (1, 2))
            ]
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(events)), events

        return jax.grad(total, has_aux=True)(model)

    (slopes, found), (expected_slopes, expected) = pull(model, batches[0], 1), pull(model, batches[1], 0)
    assert worst_gap(found, expected) < 1e-5
    assert worst_gap(slopes, expected_slopes) < 1e-4
    if memory != "null":
        assert np.abs(found[0].mean_OP[-1]).max() > 1e-3
        assert np.abs(slopes.profile.value_DP[...]).max() > 1e-3


def test_relevance_is_a_distribution_that_depends_on_the_request():
    model = make_model(make_personal())
    batch = make_batch(3, [*LENGTHS, [], [], []], 12)
    relevance = encode(model, batch).relevance_BTM
    np.testing.assert_allclose(jnp.sum(relevance, axis=-1), 1, rtol=1e-5)
    context = (batch.request.context_BTC + 1) % np.array(SIZES.context_sizes)
    other = encode(model, with_request(batch, context_BTC=context)).relevance_BTM
    assert np.abs(relevance - other)[batch.segment_BT > 0].max() > 1e-3


def test_layers_that_are_personal():
    personal = dataclasses.replace(make_config(n_layers=3), personal=PersonalConfig(layers=(1, 2)))
    assert split_layers(personal) == [(False, False, 0, 1), (False, True, 1, 3)]
    both = make_config(n_layers=3, moe=dataclasses.replace(MIXED, layers=(1,)), personal=PersonalConfig(layers=(1, 2)))
    assert split_layers(both) == [(False, False, 0, 1), (True, True, 1, 2), (False, True, 2, 3)]
    with pytest.raises(InputError, match=r"personal.layers.*lie below"):
        make_config(n_layers=3, moe=dataclasses.replace(MIXED, layers=(2,)), personal=PersonalConfig(layers=(1,)))
    with pytest.raises(InputError, match=r"personal.layers.*\[3\]"):
        make_config(n_layers=3, personal=PersonalConfig(layers=(3,)))
