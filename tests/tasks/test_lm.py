"""The next token as a task: its loss and gradient against a plain softmax over all tokens at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moerec.config import Config, DataConfig, LossConfig, MoEConfig, OptimConfig, TextConfig, TrainConfig
from moerec.convert.logits import NO_ITEMS, make_text_batch
from moerec.data.packing import Packed
from moerec.errors import InputError
from moerec.nn.model import TEXT_SIZES
from moerec.tasks import LanguageModel, make_tasks
from moerec.tasks.base import find_domains
from moerec.train.state import TrainState, start_state
from moerec.train.step import make_train_step
from moerec.types import Target
from tests.small_model import make_config, make_model, make_table, worst_gap

V, N_SLOTS = 17, 7
EXPERTS = MoEConfig(
    layers=(0,), n_per_group=3, n_active=2, d_expert=4, tile=4, services=False, reads_domain=False, bias_rate=0.01
)


def draw_batch():
    """Rows of 7, 5, 0 and 6 tokens, two of them of two documents; labels and weights are any."""
    rng = np.random.default_rng(0)
    segment = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0, 0], [0] * 7, [1] * 6 + [0]])
    weight = rng.choice([0.0, 1.0, 1.0, 2.0], segment.shape) * (segment > 0)
    label = rng.integers(0, V, segment.shape) * (weight > 0)
    batch = make_text_batch(rng.integers(0, V, segment.shape), segment)
    return batch._replace(targets={"lm": Target(label.astype(np.int32), weight.astype(np.float32))})


BATCH = draw_batch()
LABEL_BT, WEIGHT_BT = BATCH.targets["lm"]


def config_for(tie: bool = False, chunk: int = 5, n_microbatches: int = 1, experts: bool = False) -> Config:
    return Config(
        data=DataConfig(source="text", seq_len=N_SLOTS, history_len=N_SLOTS),
        tasks=("lm",),
        model=make_config(
            n_layers=1, text=TextConfig(vocab_size=V, tie_head=tie), moe=EXPERTS if experts else MoEConfig()
        ),
        loss=LossConfig(vocab_chunk=chunk, balance_weight=0.5, domain_balance_weight=0.3, router_z_weight=0.1),
        optim=OptimConfig(learning_rate=0.02, warmup_steps=0, clip_norm=0.0),
        train=TrainConfig(steps=20, batch_size=4, n_microbatches=n_microbatches),
    )


def make_text_model(config: Config):
    return make_model(config.model, seed=1, sizes=TEXT_SIZES)


@functools.cache
def step_once(*options) -> tuple[TrainState, dict[str, float]]:
    """The state and metrics after a step; `options` as of `config_for`."""
    config = config_for(*options)
    step = jax.jit(make_train_step(config, make_tasks(config)))
    state, metrics = step(start_state(config, make_text_model(config)), BATCH, NO_ITEMS, {"lm": None})
    return state, {name: float(x) for name, x in metrics.items()}


def first_moment(state: TrainState):
    """Adam's: after one step it is the gradient times 1 - b1."""
    (moments,) = (s.mu for s in state.opt_state if hasattr(s, "mu"))
    return moments


def score(model):
    """Logits `[B, T, V]` of the next token."""
    return model.text_head.score(model.encode(BATCH, NO_ITEMS).state_BTD, model.token_encoder)


@functools.cache
def plain(tie: bool):
    """The logits of all tokens, and the gradient of the mean loss by a softmax over them."""

    def mean_loss(model):
        logit_BTV = score(model)
        log_p_BT = jnp.take_along_axis(jax.nn.log_softmax(logit_BTV), LABEL_BT[..., None], axis=-1)[..., 0]
        return -jnp.sum(WEIGHT_BT * log_p_BT) / WEIGHT_BT.sum(), logit_BTV

    grads, logit_BTV = jax.jit(jax.grad(mean_loss, has_aux=True))(make_text_model(config_for(tie)))
    return grads, np.asarray(logit_BTV, np.float64)


@pytest.mark.parametrize(("tie", "chunk"), [(False, 5), (True, 5), (True, 100)])
def test_loss_and_gradient_are_those_of_a_softmax_over_all_tokens(tie, chunk):
    state, metrics = step_once(tie, chunk)
    grads, logit_BTV = plain(tie)
    total = 0.0
    for b, t in zip(*np.nonzero(WEIGHT_BT), strict=True):
        p = np.exp(logit_BTV[b, t]) / np.exp(logit_BTV[b, t]).sum()
        total -= WEIGHT_BT[b, t] * np.log(p[LABEL_BT[b, t]])
    assert metrics["loss"] == pytest.approx(total / WEIGHT_BT.sum(), rel=1e-5)
    assert metrics["slots"] == WEIGHT_BT.sum()
    assert worst_gap(jax.tree.map(lambda x: 10 * x, first_moment(state)), grads) < 2e-6  # 1 - b1 is 0.1
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(grads)) > 0.05


@pytest.mark.parametrize(("n_microbatches", "experts"), [(2, False), (4, False), (4, True)])
def test_microbatches_give_the_step_of_the_whole_batch(n_microbatches, experts):
    """Though rows are of very different weight, and one is all padding."""
    whole, metrics = step_once(False, 5, 1, experts)
    parts, parts_metrics = step_once(False, 5, n_microbatches, experts)
    assert parts_metrics == pytest.approx(metrics, rel=1e-5)
    assert worst_gap(first_moment(parts), first_moment(whole)) < 1e-6
    assert worst_gap(parts.params, whole.params) < 1e-5
    assert worst_gap(whole.params, make_text_model(config_for(experts=experts))) > 1e-3, "a step that does nothing"
    if experts:
        np.testing.assert_array_equal(parts.router_bias_LE, whole.router_bias_LE)
        assert np.any(whole.router_bias_LE)


def test_routing_is_counted_at_the_tokens_that_are_predicted_at():
    """All of one domain, so that the experts are balanced; beside events it is not counted."""
    domain_BT = find_domains([LanguageModel()], BATCH, NO_ITEMS)
    np.testing.assert_array_equal(domain_BT, np.where(WEIGHT_BT > 0, 0, -1))
    assert find_domains([LanguageModel()], BATCH, make_table()) is None


def test_targets_are_the_next_tokens_where_there_are_some():
    packed: Any = Packed(BATCH, LABEL_BT, np.array([[3, 0, -1], [-1, -1, 16]], np.int32))
    label_BT, weight_BT = LanguageModel().render(packed)
    assert label_BT.tolist() == [[3, 0, 0], [0, 0, 16]]
    assert weight_BT.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert weight_BT.dtype == np.float32


def test_a_model_or_a_stream_without_words_is_refused():
    config = config_for()
    bare = dataclasses.replace(config, model=dataclasses.replace(config.model, text=TextConfig()))
    with pytest.raises(InputError, match=r"^config\.model\.text\.vocab_size: the task lm needs words$"):
        make_tasks(bare)
    with pytest.raises(InputError, match=r"^config\.tasks: the task lm needs words, and this stream \(data\.source\)"):
        LanguageModel().render(Packed(BATCH, LABEL_BT))


@pytest.mark.parametrize(
    ("source", "tasks"), [("text", ("next_event",)), ("text", ("lm", "next_event")), ("city", ("lm",))]
)
def test_documents_have_the_task_lm_alone_and_events_do_not_have_it(source, tasks):
    with pytest.raises(InputError, match=r"^config\.tasks: .*documents \(data\.source text\)"):
        Config(data=DataConfig(source=source), tasks=tasks)
