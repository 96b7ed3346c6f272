"""The whole model against its NumPy twin; packing, causality, number formats and dropout as properties."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config, LossConfig, MoEConfig, PersonalConfig
from moerec.nn.block import split_layers, zero_router_bias
from moerec.nn.model import Predictor, SequenceModel
from moerec.nn.profile.profile_router import MEAN_PROFILE, NO_PROFILE
from moerec.tasks import Draws, NextEvent
from moerec.types import EVENT, NO_TIME, RECOMMEND
from tests.nn import numpy_model as oracle
from tests.small_model import (
    SIZES,
    assert_packed_is_alone,
    lay,
    make_batch,
    make_config,
    make_model,
    make_sequence,
    make_table,
    random_like,
    replace_slot,
    target_of,
    with_request,
    with_target,
    worst_gap,
)

TABLE = make_table()
ON_DEVICE = jax.tree.map(jnp.asarray, TABLE)
ON = {"tie_items": False, "pointer": "services", "d_pointer": 6}
BARE = {
    "item_text": False,
    "service": False,
    "action": False,
    "event_time": False,
    "request_time": False,
    "request_context": False,
    "item_bias": False,
}
LENGTHS = [[5, 3, 2], [10, 1], [4, 4]]


@jax.jit
def encode(model, batch, table, key=None):
    return model.encode(batch, table, key).state_BTD


class Pulled(NamedTuple):
    """Of a batch: the mean loss, its weight, states `[B, T, D]` with the pointers beside them, all gradients."""

    loss: jax.Array
    weight: jax.Array
    output_BTX: jax.Array
    gradients: SequenceModel

    @property
    def state_BTD(self) -> np.ndarray:
        return np.asarray(self.output_BTX)[..., :8]


@jax.jit
def pull(model, batch, table=ON_DEVICE) -> Pulled:
    """All in one program, which most tests share."""

    def total(model):
        bound = model.bind(table)
        outputs = model.encode(batch, bound)
        sums = NextEvent().loss(model, outputs, batch, bound, Draws(), Config(loss=LossConfig(chunk=5)))
        answers = [outputs.pointers.log_weight_BTX, outputs.pointers.copy_BTS]
        return sums.parts["loss"], (sums.weight, jnp.concatenate([outputs.state_BTD, *answers], axis=-1))

    (loss, aux), gradients = jax.value_and_grad(total, has_aux=True)(model)
    return Pulled(loss, *aux, gradients)


@functools.cache
def make_plain() -> SequenceModel:
    return make_model(make_config(**ON))


@functools.cache
def make_sequences(control: bool = False) -> list[list[dict]]:
    rng = np.random.default_rng(2)
    return [[make_sequence(rng, n, control=control) for n in row] for row in LENGTHS]


def make_packed(control: bool = False):
    """The sequences in three rows, and rows of padding: as many as there are sequences, so that shapes are the same."""
    rows = make_sequences(control)
    return lay([*rows, *([[]] * (sum(map(len, rows)) - len(rows)))], 12)


CONTROL = pytest.mark.parametrize("control", [False, True], ids=["events", "control slots"])


@jax.jit
def pull_states(model, batch, table, cotangent):
    """Gradients under a cotangent of the states, and the states."""

    def weighted(model):
        out = model.encode(batch, table).state_BTD
        return jnp.sum(out * cotangent), out

    return jax.grad(weighted, has_aux=True)(model)


@CONTROL
@pytest.mark.parametrize("switches", [ON, BARE], ids=["all parts", "item rows alone"])
def test_states_and_gradients_are_those_of_the_numpy_model(switches, control):
    config = make_config(**switches)
    model = make_model(config)
    batch = make_batch(4, [[4, 2]], 7, control=control)
    cotangent = np.random.default_rng(5).standard_normal((1, 7, 8))

    gradients, states = pull_states(model, batch, TABLE, cotangent)
    weights = oracle.read_weights(model)

    def expected(weights):
        return oracle.encode(weights, batch, TABLE, config, SIZES.context_sizes)

    np.testing.assert_allclose(states, expected(weights), atol=5e-5)
    oracle.assert_slopes(lambda w: np.sum(expected(w) * cotangent), weights, oracle.read_weights(gradients), 1e-4)


@CONTROL
def test_packed_sequences_have_the_states_loss_and_gradients_of_each_alone(control):
    rows = make_sequences(control)
    packed, alone = make_packed(control), lay([[sequence] for row in rows for sequence in row], 12)
    found, expected = (pull(make_plain(), batch) for batch in (packed, alone))
    assert_packed_is_alone(found.state_BTD, expected.state_BTD, rows, atol=1e-5)
    assert found.weight == expected.weight == np.sum(target_of(packed).weight_BT)
    assert found.loss == pytest.approx(float(expected.loss), rel=1e-5)
    size = max(float(np.abs(g).max()) for g in jax.tree.leaves(found.gradients))
    assert worst_gap(found.gradients, expected.gradients) < 1e-5 * size


def test_a_slot_reaches_only_later_states_of_its_sequence():
    batch = make_packed()
    before = np.asarray(pull(make_plain(), batch).output_BTX)
    b, t = 0, 2
    reached = np.zeros(batch.item_BT.shape, bool)
    reached[b, t:5] = True
    changes = {
        "item_BT": (batch.item_BT[b, t] + 1) % SIZES.n_items,
        "action_BT": (batch.action_BT[b, t] + 1) % SIZES.n_actions,
        "time_BT": 123_456_789,
        "request.time_BT": 223_456_789,
        "request.context_BTC": (batch.request.context_BTC[b, t] + 1) % np.array(SIZES.context_sizes),
    }
    for name, value in changes.items():
        after = np.asarray(pull(make_plain(), replace_slot(batch, name, (b, t), value)).output_BTX)
        np.testing.assert_array_equal(after[~reached], before[~reached], err_msg=name)
        assert np.all(np.abs(after - before)[..., :8][reached].max(axis=-1) > 1e-6), name


def test_the_answer_is_no_input():
    batch = make_packed()
    label_BT, weight_BT = target_of(batch)
    other = with_target(batch, label_BT=(label_BT + 1) % SIZES.n_items, weight_BT=1 - weight_BT)
    found, expected = (pull(make_plain(), each) for each in (other, batch))
    np.testing.assert_array_equal(found.output_BTX, expected.output_BTX)
    assert found.loss != expected.loss


def test_bfloat16_is_close_and_weights_and_gradients_stay_float32():
    """In a plain layer, and in one with experts and a profile above it."""
    parts = {
        # A slot goes to all experts: which of several it goes to may hang on a rounding.
        "moe": MoEConfig(layers=(1,), n_per_group=1, n_active=4, d_expert=8, tile=8),
        "personal": PersonalConfig(layers=(1,), n_aspects=3, d_memory=4),
    }
    half = make_model(make_config(compute_dtype="bfloat16", **parts, **ON))
    found, exact = (pull(model, make_packed()) for model in (half, make_model(make_config(**parts, **ON))))
    assert found.output_BTX.dtype == jnp.float32
    gap = found.state_BTD - exact.state_BTD
    assert 0 < np.sqrt(np.mean(gap**2)) < 0.03  # states have a mean square of about 1
    assert found.loss == pytest.approx(float(exact.loss), rel=0.02)
    assert {x.dtype for x in jax.tree.leaves((half, found.gradients))} == {jnp.dtype("float32")}
    flat, exact_flat = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(x.gradients)]) for x in (found, exact))
    cosine = flat @ exact_flat / np.linalg.norm(flat) / np.linalg.norm(exact_flat)
    assert cosine > 0.99


def test_remat_changes_nothing():
    found, plain = (pull(model, make_packed()) for model in (make_model(make_config(remat=True, **ON)), make_plain()))
    assert found.loss == pytest.approx(float(plain.loss), rel=1e-6)
    assert worst_gap(jax.tree.leaves(found.gradients), jax.tree.leaves(plain.gradients)) < 1e-4


def test_dropout_is_a_function_of_its_key_and_off_without_one():
    batch, model = make_packed(), make_model(make_config(dropout=0.3, **ON))
    off, plain = (encode.lower(m, batch, TABLE).as_text() for m in (model, make_plain()))
    assert off == plain
    once, again, other = (encode(model, batch, TABLE, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0.1
    assert np.abs(once - pull(make_plain(), batch).state_BTD).max() > 0.1


@jax.jit
def find_vectors(model, items, table):
    return model.head.vectors(items, table, model.item_encoder)


@pytest.mark.parametrize("tie", [True, False])
def test_candidates_use_the_input_vectors_only_if_tied(tie):
    model = make_model(make_config(tie_items=tie))
    items = np.array([[0, 5], [7, 12]])
    vectors, bias = find_vectors(model, items, TABLE)
    weights = oracle.read_weights(model)
    w = oracle.part(weights, "item_encoder" if tie else "head.encoder")
    expected = [[oracle.item_vector(w, i, TABLE, 1e-6) for i in row] for row in items]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(bias, weights["head.bias_I"][items])
    assert ("head.encoder.row_ID" in weights) != tie


def test_without_item_bias_scores_have_none():
    model = make_model(make_config(item_bias=False))
    assert model.head.bias_I is None
    np.testing.assert_array_equal(find_vectors(model, np.arange(3), TABLE)[1], np.zeros(3))


def test_contexts_are_hidden_in_training_alone():
    batch = make_batch(5, [[6]], 8)
    small, key = {**BARE, "request_context": True}, jax.random.key(3)
    models = [make_model(make_config(**small, context_dropout=rate)) for rate in (0.0, 0.9)]
    assert len({encode.lower(model, batch, TABLE).as_text() for model in models}) == 1
    plain = encode(models[0], batch, TABLE)
    never, often = (encode(model, batch, TABLE, key) for model in models)
    np.testing.assert_allclose(never[0, :6], plain[0, :6], atol=1e-5)
    assert np.abs(often - plain)[0, :6].max() > 1e-2


# Everything that a model can have: experts, profile, pointers; a slot goes to two experts of four. There are two layers
# of each kind, so that the groups of a test that cuts them share a program with what it is compared with.
FULL = {
    "n_layers": 4,
    "moe": MoEConfig(layers=(2, 3), n_per_group=1, n_active=2, d_expert=4, tile=4),
    "personal": PersonalConfig(layers=(2, 3), n_aspects=3, d_memory=4, chunk=4),
    "pointer": "services",
    "d_pointer": 6,
}


def make_full(tie: bool = True, **fields) -> SequenceModel:
    return make_model(make_config(**{**FULL, "tie_items": tie, **fields}))


@jax.jit
def encode_predictor(predictor, batch, table, domain_BT):
    return predictor.encode(batch, table, domain_BT=domain_BT)


def encode_outputs(model, batch, table=TABLE, domain_BT=None, router_bias_LE=None):
    """All outputs by one program for all batches of three rows; nothing is counted and steered if it is not asked."""
    if domain_BT is None:
        domain_BT = np.full(batch.item_BT.shape, -1, np.int32)
    if router_bias_LE is None:
        router_bias_LE = np.zeros((2, 4), np.float32)
    return encode_predictor(Predictor(model, router_bias_LE), batch, table, domain_BT)


def assert_outputs_equal(found, expected, atol: float = 0):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def test_nothing_but_the_routing_sums_depends_on_targets_or_domains():
    model, batch = make_full(), make_batch(4, LENGTHS, 12, control=True)
    domain_BT = np.random.default_rng(1).integers(-1, SIZES.n_services, batch.item_BT.shape).astype(np.int32)
    first = encode_outputs(model, batch, domain_BT=domain_BT)
    label_BT, weight_BT = target_of(batch)
    other = with_target(batch, label_BT=(label_BT + 1) % SIZES.n_items, weight_BT=1 - weight_BT)
    assert_outputs_equal(encode_outputs(model, other, domain_BT=domain_BT), first)
    without_targets = batch._replace(targets={})
    assert_outputs_equal(encode_outputs(model, without_targets, domain_BT=domain_BT), first)
    moved = encode_outputs(model, batch, domain_BT=np.where(domain_BT >= 0, (domain_BT + 1) % 3, -1))
    assert_outputs_equal(moved._replace(routing=None), first._replace(routing=None))
    np.testing.assert_array_equal(moved.routing.count_LZE, np.roll(first.routing.count_LZE, 1, axis=1))
    np.testing.assert_allclose(moved.routing.probability_LZE, np.roll(first.routing.probability_LZE, 1, 1), atol=1e-5)
    nowhere = encode_outputs(model, batch)
    assert_outputs_equal(nowhere._replace(routing=None), first._replace(routing=None))
    not_given, _ = pull_outputs(model, batch)
    assert_outputs_equal(not_given, nowhere, atol=1e-5)
    for found in (nowhere, not_given):  # no slot is counted
        assert not np.any(found.routing.count_LZE)
        assert not np.any(found.routing.square_lse_L)


@functools.partial(jax.jit, static_argnames=("bind", "read"))
def pull_outputs(model, batch, table=ON_DEVICE, bind: bool = False, read: bool = False):
    """All outputs, and the gradients of all parameters under a random cotangent of states, posterior and mixture.

    Of a catalogue that is bound, or of profiles that have been read before.
    """

    def total(model):
        catalog = model.bind(table) if bind else table
        profile = model.read_profiles(batch, catalog) if read else None
        outputs = model.encode(batch, catalog, profile=profile)
        answers = (outputs.pointers.log_weight_BTX, outputs.pointers.copy_BTS)
        parts = (outputs.state_BTD, outputs.log_domain_BTZ, outputs.relevance_BTM, *answers)
        pulled = jax.tree.map(lambda x, c: jnp.sum(x * c), parts, random_like(parts))
        return sum(jax.tree.leaves(pulled)), outputs

    (_, outputs), gradients = jax.value_and_grad(total, has_aux=True)(model)
    return outputs, gradients


@jax.jit
def pull_both(model, batch, table):
    return [pull_outputs(model, batch, table, bind) for bind in (False, True)]


@pytest.mark.parametrize("tie", [True, False])
def test_a_bound_catalogue_gives_the_outputs_and_gradients_of_an_unbound_one(tie):
    model, batch = make_full(tie), make_batch(4, LENGTHS, 12, control=True)
    if tie:
        (outputs, gradients), (bound, bound_gradients) = (
            pull_outputs(model, batch, bind=bind) for bind in (False, True)
        )
    else:  # what is bound is read by none of these outputs: the two are compiled as little more than one
        (outputs, gradients), (bound, bound_gradients) = pull_both(model, batch, TABLE)
    assert_outputs_equal(bound, outputs, atol=1e-5)
    largest = worst_gap(gradients, jax.tree.map(jnp.zeros_like, gradients))
    assert worst_gap(bound_gradients, gradients) < 2e-6 * largest


@pytest.mark.parametrize("tie", [True, False])
def test_a_bound_catalogue_holds_vectors_and_biases_of_all_candidates_and_can_be_bound_anew(tie):
    model = make_model(make_config(tie_items=tie))
    bind = jax.jit(lambda model, table: model.bind(table))
    bound, weights = bind(model, TABLE), oracle.read_weights(model)
    w = oracle.part(weights, "item_encoder" if tie else "head.encoder")
    expected = [oracle.item_vector(w, i, TABLE, 1e-6) for i in range(SIZES.n_items)]
    np.testing.assert_allclose(bound.vector_ID, expected, atol=1e-5)
    np.testing.assert_allclose(bound.bias_I, weights["head.bias_I"])
    other = make_model(make_config(tie_items=tie), seed=1)
    assert_outputs_equal(bind(other, bound), bind(other, TABLE))


def test_profiles_that_are_read_before_are_those_that_the_model_reads():
    """Values, and gradients in the memory's parameters, from nobody and from what the past has left."""
    model, batch = make_full(), make_batch(4, LENGTHS, 12, control=True)
    (outputs, gradients), (read, read_gradients) = (pull_outputs(model, batch, read=read) for read in (False, True))
    assert_outputs_equal(read, outputs, atol=1e-5)
    largest = worst_gap(gradients.profile, jax.tree.map(jnp.zeros_like, gradients.profile))
    assert largest > 1e-3
    assert worst_gap(read_gradients, gradients) < 1e-5 * max(largest, 1)


def make_twins(seed: int, n: int = 6):
    """Two users with one history, but other fields."""
    one = make_sequence(np.random.default_rng(seed), n)
    other = {**one, "request.field": (one["request.field"] + 1) % np.array(SIZES.field_sizes)}
    return lay([[one], [other]], 8)


@functools.cache
def make_personal_model() -> SequenceModel:
    personal = PersonalConfig(layers=(1,), n_aspects=3, n_scales=2, d_memory=4, chunk=4)
    return make_model(make_config(personal=personal, event_time=False, request_time=False))


@jax.jit
def encode_given(batch, source_BT):
    """States of two rows of eight slots under the profiles of other slots, and under none that is given."""
    model = make_personal_model()
    profile = model.replace_profiles(model.read_profiles(batch, ON_DEVICE), source_BT, batch)
    return [model.encode(batch, ON_DEVICE, profile=given).state_BTD for given in (profile, None)]


def encode_under(batch, source_BT) -> np.ndarray:
    return np.asarray(encode_given(batch, source_BT)[0])


OWN = np.arange(16, dtype=np.int32).reshape(2, 8)


def test_with_its_own_profile_a_slot_is_as_it_was():
    given, own = encode_given(make_twins(1), OWN)
    np.testing.assert_allclose(given, own, atol=1e-5)


def test_nobodys_profile_is_that_of_a_first_slot_without_fields():
    rng = np.random.default_rng(1)
    users = [make_sequence(rng, n) for n in (6, 7)]
    users[0]["request.field"] = np.zeros_like(users[0]["request.field"])
    batch = lay([[user] for user in users], 8)
    gap = encode_under(batch, np.full_like(OWN, NO_PROFILE)) - encode_under(batch, OWN)
    changed = np.abs(gap).max(axis=-1) > 1e-4
    assert changed[0, :6].tolist() == [False, *[True] * 5]
    assert changed[1, :7].all()


def test_twins_with_each_others_profile_have_each_others_states():
    batch = make_twins(2)
    plain = encode_under(batch, OWN)
    assert np.abs(plain[0] - plain[1]).max() > 1e-3
    np.testing.assert_allclose(encode_under(batch, OWN[::-1]), plain[::-1], atol=1e-5)


def test_with_the_mean_profile_twins_have_one_state():
    """The mean is that of the slots alone: what stands in the padding changes nothing."""
    batch, mean = make_twins(3), np.full_like(OWN, MEAN_PROFILE)
    states = encode_under(batch, mean)
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    assert np.abs(states - encode_under(batch, OWN))[:, :6].max() > 1e-3
    item_BT = np.where(batch.segment_BT > 0, batch.item_BT, 3)
    other = encode_under(batch._replace(item_BT=item_BT), mean)
    np.testing.assert_allclose(other[:, :6], states[:, :6], atol=1e-6)


def test_further_groups_of_the_same_layers_compute_the_same():
    """States, posterior, routing and pointers, and all gradients, of the same weights where a group is cut in two."""
    plain = make_full()
    config = make_config(**FULL, group_starts=(3,))
    assert (len(split_layers(config)), len(plain.groups)) == (3, 2)
    bounds = [(group.first, group.last) for group in split_layers(config)]

    def regroup(groups):
        """Each layer on its own, then in the groups of the config."""
        each = [jax.tree.map(lambda w, i=i: w[i : i + 1], g) for g in groups for i in range(len(g.ffn_norm.scale[...]))]
        return [jax.tree.map(lambda *w: jnp.concatenate(w), *each[first:last]) for first, last in bounds]

    shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, SIZES))
    rest = {id(leaf) for group in plain.groups for leaf in jax.tree.leaves(group)}
    others = [leaf for leaf in jax.tree.leaves(plain) if id(leaf) not in rest]
    leaves, other_leaves = [], iter(others)
    grouped = iter(jax.tree.leaves(regroup(plain.groups)))
    for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        leaves.append(next(grouped if "groups" in jax.tree_util.keystr(path) else other_leaves))
    model = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    batch = make_batch(4, LENGTHS, 12, control=True)
    (found, d_found), (expected, d_expected) = (pull_outputs(m, batch) for m in (model, plain))
    assert_outputs_equal(found, expected, atol=1e-5)
    largest = worst_gap(d_expected, jax.tree.map(jnp.zeros_like, d_expected))
    assert (
        worst_gap(jax.tree.leaves(list(d_found.groups)), jax.tree.leaves(regroup(d_expected.groups))) < 1e-5 * largest
    )
    assert worst_gap(d_found.item_encoder, d_expected.item_encoder) < 1e-5 * largest


def test_a_predictor_encodes_under_the_biases_of_its_routers():
    """A bias that is passed in steers; none is zero."""
    model, batch = make_full(), make_batch(4, LENGTHS, 12, control=True)
    nothing = zero_router_bias(model.config, SIZES.n_services)
    np.testing.assert_array_equal(nothing, np.zeros((2, 4)))
    bias_LE = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4)), jnp.float32)
    plain, steered = (encode_outputs(model, batch, router_bias_LE=bias) for bias in (nothing, bias_LE))
    assert_outputs_equal(plain, pull_outputs(model, batch)[0], atol=1e-5)
    # The predictor's program, whatever the bias, is that of the model under it.
    by_model = jax.jit(lambda given, batch: given[0].encode(batch, ON_DEVICE, router_bias_LE=given[1]))
    by_predictor = jax.jit(lambda given, batch: given.encode(batch, ON_DEVICE))
    expected = by_model.lower((model, bias_LE), batch).as_text()
    assert by_predictor.lower(Predictor(model, bias_LE), batch).as_text() == expected
    assert np.abs(steered.state_BTD - plain.state_BTD).max() > 1e-2
    np.testing.assert_array_equal(steered.log_domain_BTZ, plain.log_domain_BTZ)  # below the experts
    assert Predictor(model, bias_LE).config is model.config


def test_the_answer_of_a_control_slot_depends_on_the_request_and_the_fields_alone():
    """In a model with everything; and each of these reaches it."""
    model, batch = make_full(), make_batch(4, [[5, 4], [3], []], 12, control=True)
    is_control = batch.kind_BT == RECOMMEND
    assert is_control.sum() == 3

    def look(batch, catalog=TABLE):
        outputs = encode_outputs(model, batch, catalog)
        parts = (outputs.state_BTD, outputs.log_domain_BTZ, outputs.relevance_BTM, outputs.pointers.log_weight_BTX)
        return np.concatenate(parts, axis=-1)[is_control]

    def assert_same(found, expected, err_msg=""):
        # The last bit of what an expert gives may hang on the rows that stand beside its own.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6, err_msg=err_msg)

    before, rng = look(batch), np.random.default_rng(5)

    def redraw(column, n: int):
        return rng.integers(0, n, column.shape).astype(np.int32)

    events = {
        "item_BT": redraw(batch.item_BT, SIZES.n_items),  # of the control slot, too, where an item has no meaning
        "action_BT": redraw(batch.action_BT, SIZES.n_actions),
        "utc_offset_BT": 3600 * redraw(batch.utc_offset_BT, 12),
        "time_BT": np.where(is_control, NO_TIME, redraw(batch.time_BT, 10**9)).astype(np.int32),
        "service_BT": np.where(batch.kind_BT == EVENT, redraw(batch.service_BT, 3), batch.service_BT).astype(np.int32),
    }
    for name, column in events.items():
        assert_same(look(batch._replace(**{name: column})), before, name)
    label_BT = target_of(batch).label_BT
    assert_same(look(with_target(batch, label_BT=(label_BT + 1) % SIZES.n_items)), before)
    # Requests of other slots, which are carried by events, say nothing to it.
    request = batch.request
    requests = {
        "time_BT": redraw(request.time_BT, 10**9),
        "utc_offset_BT": 3600 * (redraw(request.time_BT, 9) + 1 + request.utc_offset_BT // 3600),
        "context_BTC": (request.context_BTC + 1) % np.array(SIZES.context_sizes),
        "field_BTY": (request.field_BTY + 1) % np.array(SIZES.field_sizes),
    }
    known = with_request(batch, time_BT=np.where(is_control, 10**6, request.time_BT).astype(np.int32))
    known_before = look(known)
    for name, column in requests.items():
        old = getattr(known.request, name)
        over = is_control.reshape(*is_control.shape, *[1] * (old.ndim - 2))
        elsewhere = with_request(known, **{name: np.where(over, old, column).astype(np.int32)})
        assert_same(look(elsewhere), known_before, name)
        here = with_request(known, **{name: np.where(over, column, old).astype(np.int32)})
        assert np.all(np.abs(look(here) - known_before).max(axis=-1) > 1e-5), name
    # Of the catalogue nothing, either: there is no item.
    assert_same(look(batch, TABLE._replace(token_IW=np.roll(TABLE.token_IW, 1, axis=0))), before)


def test_two_control_slots_with_one_request_have_one_answer_wherever_they_stand():
    """In whose sequence, at which place of the row, before whatever follows."""
    model, rng = make_full(), np.random.default_rng(6)
    users = [make_sequence(rng, n, control=True) for n in (3, 5, 2)]
    for user in users[1:]:
        for name in ("time", "utc_offset", "context", "field"):
            column = user[f"request.{name}"].copy()
            column[0] = users[0][f"request.{name}"][0]
            user[f"request.{name}"] = column
    batch = lay([users[:2], users[2:], []], 12)
    outputs = encode_outputs(model, batch)
    found = [outputs.state_BTD, outputs.log_domain_BTZ, outputs.relevance_BTM, outputs.pointers.log_weight_BTX]
    for part in found:
        first, *others = np.asarray(part)[batch.kind_BT == RECOMMEND]
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-5)
