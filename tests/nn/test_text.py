"""Words in the stream: text alone goes as through a language model, beside events it is one of their sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import AskConfig, Config, LossConfig, MoEConfig, PersonalConfig, TextConfig
from moerec.convert.logits import make_text_batch
from moerec.convert.paths import flatten, unflatten
from moerec.errors import InputError
from moerec.nn.model import TEXT_SIZES, SequenceModel
from moerec.nn.moe.hypotheses import ask_all
from moerec.nn.sharding import batch_sharding, make_mesh, param_shardings
from moerec.tasks import Draws, LanguageModel
from moerec.types import EVENT, NO_ITEMS, NO_TIME, RECOMMEND, TOKEN, Batch, Target
from tests.small_model import SIZES, fill, make_config, make_model, make_sequence, make_table, worst_gap

V = 17
TEXT = TextConfig(vocab_size=V, tie_head=False)
TABLE = jax.tree.map(jnp.asarray, make_table())
MOE = MoEConfig(layers=(1,), n_per_group=3, n_active=2, d_expert=6, d_shared=5, shared_gate=True, tile=4)
KINDS = {
    "dense": {"pointer": "services", "d_pointer": 6},
    "personal": {"personal": PersonalConfig(layers=(0, 1), n_aspects=2, n_scales=1, d_memory=4)},
    "experts": {"moe": MOE},
    "experts, as their softmax": {"moe": dataclasses.replace(MOE, renormalise=False)},
    "few open groups": {"moe": dataclasses.replace(MOE, n_open_groups=1)},
    "personal experts": {
        "moe": MOE,
        "personal": PersonalConfig(layers=(1,), n_aspects=2, n_scales=1, d_memory=4),
        "pointer": "all",
    },
    "asked": {"ask": AskConfig(from_layer=1, d_analyser=8), "moe": MOE, "pointer": "services"},
}


def make_text_model(model: SequenceModel) -> SequenceModel:
    """A model of text alone of the same weights: of the experts those of the cross group."""
    moe = model.config.moe
    bare = make_config(
        text=model.config.text,
        group_starts=(1,),
        moe=dataclasses.replace(moe, services=False, reads_domain=False, n_open_groups=0)
        if moe.layers
        else MoEConfig(),
    )
    like = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), bare, TEXT_SIZES))
    there, n_experts = split_layers(model), moe.n_per_group
    leaves = {}
    for path, leaf in flatten(like).items():
        found = there[path]
        if found.shape != leaf.shape:  # `[1, E, ...]`
            found = found[:, -n_experts:]
        leaves[path] = found
    return unflatten(like, leaves)


def split_layers(model: SequenceModel) -> dict[str, jax.Array]:
    """Leaves by path, as of a model whose groups are single layers."""
    found = {}
    for path, leaf in flatten(model).items():
        parts = path.split("/")
        if parts[0] == "groups" and len(model.groups) == 1:
            for layer in range(2):
                found["/".join(["groups", str(layer), *parts[2:]])] = leaf[layer : layer + 1]
        else:
            found[path] = leaf
    return found


def draw_text(seed: int = 0) -> Batch:
    """Two rows: one document and padding, and two documents."""
    rng = np.random.default_rng(seed)
    segment = np.array([[1] * 6 + [0] * 3, [1] * 4 + [2] * 5])
    return make_text_batch(rng.integers(0, V, segment.shape), segment)


@jax.jit
def encode(model, batch, catalog):
    return model.encode(batch, catalog)


def of_events(batch: Batch) -> Batch:
    """A batch of text as a model with events takes it: no slot has a service, a context or fields."""
    shape = batch.kind_BT.shape
    nothing = [np.zeros((*shape, len(sizes)), np.int32) for sizes in (SIZES.context_sizes, SIZES.field_sizes)]
    request = batch.request._replace(context_BTC=nothing[0], field_BTY=nothing[1])
    return batch._replace(service_BT=np.full(shape, SIZES.n_services, np.int32), request=request)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_goes_as_through_a_language_model_of_the_same_weights(kind):
    """Whatever the model has for events, and however it is trained: all weights are random."""
    model = make_model(make_config(text=TEXT, **KINDS[kind]))
    batch = draw_text()
    found = encode(model, of_events(batch), model.bind(TABLE)).state_BTD
    alone = encode(make_text_model(model), batch, NO_ITEMS).state_BTD
    real = batch.segment_BT > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(alone)[real], rtol=0, atol=3e-6)


@pytest.mark.parametrize("cross", [True, False])
def test_a_token_uses_no_experts_of_a_service(cross):
    """Changing those of all services changes nothing of it; without a cross group the shared expert is all there is."""
    moe = dataclasses.replace(MOE, cross=cross)
    model = make_model(make_config(text=TEXT, moe=moe))
    batch = of_events(draw_text())
    before = encode(model, batch, TABLE).state_BTD
    n_own = SIZES.n_services * moe.n_per_group

    def change(path, leaf):
        return leaf.at[:, :n_own].add(1) if path.rsplit("/", 1)[-1] in ("gate_EDF", "up_EDF", "down_EFD") else leaf

    changed = unflatten(model, {path: change(path, leaf) for path, leaf in flatten(model).items()})
    np.testing.assert_array_equal(before, encode(changed, batch, TABLE).state_BTD)
    counted = encode(model, batch, TABLE).routing.count_LZE
    assert float(jnp.sum(counted)) == 0


def lay_mixed(seed: int, parts: list[str]) -> Batch:
    """One row: `events`, `words` or `control` parts of a sequence, in turn."""
    rng = np.random.default_rng(seed)
    columns = []
    for part in parts:
        own = make_sequence(rng, 1 if part == "control" else 3, control=part == "control")
        n = len(own["item"])
        if part == "words":
            own |= {"kind": np.full(n, TOKEN), "item": np.zeros(n, int), "action": np.zeros(n, int)}
            own |= {
                "service": np.full(n, SIZES.n_services),
                "time": np.full(n, NO_TIME),
                "utc_offset": np.zeros(n, int),
            }
        own["token"] = rng.integers(0, V, n) if part == "words" else np.zeros(n, int)
        columns.append(own)
    whole = {name: np.concatenate([own[name] for own in columns])[None] for name in columns[0]}
    n = whole["item"].shape[1]
    whole["position"], whole["segment"] = np.arange(n)[None], np.ones((1, n), int)
    kept = ("kind", "item", "service", "action", "time", "utc_offset", "position", "segment")
    batch = make_text_batch(whole["token"])
    request = batch.request._replace(
        **{
            f"{name}_{letters}": whole[f"request.{name}"].astype(np.int32)
            for name, letters in (("time", "BT"), ("utc_offset", "BT"), ("context", "BTC"), ("field", "BTY"))
        }
    )
    own = {f"{name}_BT": whole[name].astype(np.int32) for name in kept}
    return batch._replace(**own, request=request, token_BT=whole["token"].astype(np.int32))


MIXED = ["control", "events", "words", "control", "events"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_sees_words_and_events_before_it_and_none_after(kind):
    model = make_model(make_config(text=TEXT, **KINDS[kind]))
    catalog = model.bind(TABLE)
    batch = lay_mixed(1, MIXED)
    before = np.asarray(encode(model, batch, catalog).state_BTD)[0]
    word = int(np.flatnonzero(batch.kind_BT[0] == TOKEN)[1])
    other = batch.token_BT.copy()
    other[0, word] = (other[0, word] + 1) % V
    after = np.asarray(encode(model, batch._replace(token_BT=other), catalog).state_BTD)[0]
    moved = np.abs(after - before).max(axis=1)
    assert moved[:word].max() < 1e-7
    assert moved[word:].min() > 1e-6
    item = batch.item_BT.copy()
    event = int(np.flatnonzero(batch.kind_BT[0] == EVENT)[2])
    item[0, event] = (item[0, event] + 1) % SIZES.n_items
    service = batch.service_BT.copy()
    service[0, event] = np.asarray(TABLE.service_I)[item[0, event]]
    changed = batch._replace(item_BT=item, service_BT=service)
    after = np.asarray(encode(model, changed, catalog).state_BTD)[0]
    words = np.flatnonzero(batch.kind_BT[0] == TOKEN)
    assert np.abs(after - before).max(axis=1)[words].min() > 1e-6


def test_a_request_after_words_is_answered_at_the_control_token():
    """The words' slots know nothing of the request; the control token behind them does."""
    model = make_model(make_config(text=TEXT))
    batch = lay_mixed(2, ["control", "events", "words", "control"])
    before = np.asarray(encode(model, batch, TABLE).state_BTD)[0]
    words = batch.kind_BT == TOKEN
    context = np.where(words[..., None], (batch.request.context_BTC + 1) % 3, batch.request.context_BTC)
    same = batch._replace(request=batch.request._replace(context_BTC=context))
    np.testing.assert_array_equal(before, np.asarray(encode(model, same, TABLE).state_BTD)[0])
    last = int(np.flatnonzero(batch.kind_BT[0] == RECOMMEND)[-1])
    context = batch.request.context_BTC.copy()
    context[0, last] = (context[0, last] + 1) % 3
    other = batch._replace(request=batch.request._replace(context_BTC=context))
    moved = np.abs(np.asarray(encode(model, other, TABLE).state_BTD)[0] - before).max(axis=1)
    assert moved[:last].max() == 0
    assert moved[last] > 1e-6


def test_asked_services_hear_the_words():
    model = make_model(make_config(text=TEXT, **KINDS["asked"]))
    catalog = model.bind(TABLE)
    batch = lay_mixed(3, ["control", "events", "words", "control"])
    flat_Q = jnp.array([batch.kind_BT.shape[1] - 1])

    @jax.jit
    def ask(batch):
        return model.ask(batch, catalog, flat_Q, ask_all(jnp.zeros((1, 3)))).state_QXD

    other = batch.token_BT.copy()
    other[batch.kind_BT == TOKEN] = (other[batch.kind_BT == TOKEN] + 1) % V
    moved = np.abs(np.asarray(ask(batch) - ask(batch._replace(token_BT=other)))).max(axis=-1)
    assert moved.min() > 1e-6


def test_without_words_a_model_that_knows_some_is_the_one_that_knows_none():
    model = make_model(make_config(text=TEXT, **KINDS["personal experts"]))
    catalog = model.bind(TABLE)
    batch = lay_mixed(4, ["control", "events", "events"])
    with_none = encode(model, batch._replace(token_BT=None), catalog)
    np.testing.assert_allclose(with_none.state_BTD, encode(model, batch, catalog).state_BTD, rtol=0, atol=1e-6)


def test_a_packed_document_is_read_as_if_it_were_alone():
    model = fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), make_config(text=TEXT), TEXT_SIZES)))
    batch = draw_text()
    packed = np.asarray(encode(model, batch, NO_ITEMS).state_BTD)
    for row, span in ((0, slice(0, 6)), (1, slice(0, 4)), (1, slice(4, 9))):
        alone = encode(model, make_text_batch(batch.token_BT[row : row + 1, span]), NO_ITEMS).state_BTD
        np.testing.assert_allclose(packed[row, span], np.asarray(alone)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_loss_and_gradients_of_text_on_a_mesh_are_those_of_one_device(kind, mesh):
    own = dataclasses.replace(MOE, services=False, reads_domain=False, n_per_group=4)
    moe = own if kind == "experts" else MoEConfig()
    config = make_config(text=TextConfig(16, tie_head=False), moe=moe)
    model = fill(jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, TEXT_SIZES)))
    rng, options = np.random.default_rng(5), Config(loss=LossConfig(vocab_chunk=5))
    batch = make_text_batch(rng.integers(0, 16, (4, 8)))
    target = Target(rng.integers(0, 16, (4, 8)).astype(np.int32), rng.choice([0, 1, 2.0], (4, 8)).astype(np.float32))
    batch = batch._replace(targets={"lm": target})

    def loss(model, batch):
        outputs = model.encode(batch, NO_ITEMS, domain_BT=jnp.zeros(batch.kind_BT.shape, jnp.int32))
        total = LanguageModel().loss(model, outputs, batch, NO_ITEMS, Draws(), options).total
        return total if outputs.routing is None else total + jnp.sum(outputs.routing.probability_LZE[..., 0])

    alone = jax.jit(jax.value_and_grad(loss))(model, batch)
    on = make_mesh(*mesh)
    with jax.set_mesh(on):
        placed = jax.device_put(model, param_shardings(model, on)), jax.device_put(batch, batch_sharding(on))
        split = jax.jit(jax.value_and_grad(loss))(*placed)
    assert abs(float(alone[0]) - float(split[0])) < 1e-4
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(alone[1]))
    assert worst_gap(alone[1], split[1]) < 2e-6 * largest


def test_a_model_needs_something_to_read():
    with pytest.raises(InputError, match=r"config\.model\.text\.vocab_size: without items and without words"):
        SequenceModel(jax.random.key(0), make_config(), TEXT_SIZES)


@pytest.mark.parametrize(
    ("field", "parts"),
    [
        ("personal.layers", KINDS["personal"]),
        ("ask.from_layer", {"ask": AskConfig(from_layer=1)}),
        ("pointer", {"pointer": "all"}),
        ("moe.services", {"moe": MOE}),
    ],
)
def test_parts_of_events_are_refused_where_there_are_none(field, parts):
    with pytest.raises(InputError, match=rf"config\.model\.{field}: "):
        SequenceModel(jax.random.key(0), make_config(text=TEXT, **parts), TEXT_SIZES)
