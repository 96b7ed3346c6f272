"""What happens at each slot of a pass: whom it attends to, and to which experts it goes.

The passes that train and answer keep no such thing: attention in blocks never has its weights in memory, and routing is
summed. Here the same layers are run one by one, and what they do is written out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.nn.attention import ProfileContext, causal_segment_mask
from moerec.nn.block import Block, LayerContext, split_layers, zero_router_bias
from moerec.nn.layers import MASK_VALUE
from moerec.nn.model.predictor import Predictor
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.hypotheses import followed_services
from moerec.nn.temporal import N_GAPS
from moerec.types import Array, Batch, Catalog
from pallas_kernels.attention import find_bucket


class SlotTrace(NamedTuple):
    """Attributes:
    attention_BLNTS: float32, what each head of each layer gives each slot s in what it reads at slot t; where a
      personal layer reads the profile, too, as far as its gate is open, rows of both add up to one.
    memory_BLNTM: float32, what it gives each memory slot of the profile; zeros in layers that read none, None where no
      layer does.
    expert_BLTA: int32 experts of each slot in the mixture layers, best first; weight_BLTA: float32, their weights. None
      without experts.
    log_domain_BTZ, relevance_BTM: as in `Outputs`.
    """

    attention_BLNTS: Array
    memory_BLNTM: Array | None
    expert_BLTA: Array | None
    weight_BLTA: Array | None
    log_domain_BTZ: Array | None
    relevance_BTM: Array | None


def trace_slots(
    predictor: Predictor, batch: Batch, catalog: Catalog, hypothesis_BT: jax.Array | None = None
) -> SlotTrace:
    """The pass of `Predictor.encode`, layer by layer.

    Args: a bound catalogue; as in `SequenceModel.encode`, whom slots ask.
    """
    model, config = predictor.params, predictor.config
    below = model.read(batch, catalog)
    _, x_BTD = model._embed(batch, catalog, None)
    x_BTD = x_BTD.astype(jnp.dtype(config.compute_dtype))
    plain = LayerContext(batch.position_BT, batch.segment_BT)
    seen: list[tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array] | None]] = []
    for blocks, group in zip(model.groups, split_layers(config), strict=True):
        if group.last <= model.config.n_trunk:
            for layer in _list_layers(blocks):
                seen.append((*_weigh_slots(layer, x_BTD, plain), None))
                x_BTD, _ = layer(x_BTD, plain)
    x_BTD, context = below.x_BTD, below.context
    if model.hypothesis_ZD is not None:
        hypothesis_BT = followed_services(batch, model.n_services) if hypothesis_BT is None else hypothesis_BT
        x_BTD, context = model._suppose(x_BTD, context, hypothesis_BT)
    bias_LE = predictor.router_bias_LE
    bias_LE = zero_router_bias(config, model.n_services) if bias_LE is None else bias_LE
    for blocks, _, bias in model._upper_groups(bias_LE):
        for number, layer in enumerate(_list_layers(blocks)):
            own = None if bias is None else bias[number]
            chosen = _choose_experts(layer, x_BTD, context, own)
            seen.append((*_weigh_slots(layer, x_BTD, context), chosen))
            x_BTD, _ = layer(x_BTD, context, own)
    events, memories, chosen = zip(*seen, strict=True)
    memory_BLNTM = None
    if any(memory is not None for memory in memories):
        width = max(memory.shape[-1] for memory in memories if memory is not None)
        none_BNTM = jnp.zeros((*events[0].shape[:-1], width))
        memory_BLNTM = jnp.stack([none_BNTM if memory is None else memory for memory in memories], axis=1)
    mixed = [pair for pair in chosen if pair is not None]
    expert, weight = (jnp.stack(x, axis=1) for x in zip(*mixed, strict=True)) if mixed else (None, None)
    attention_BLNTS = jnp.stack(events, axis=1)
    return SlotTrace(attention_BLNTS, memory_BLNTM, expert, weight, below.log_domain_BTZ, below.relevance_BTM)


def _list_layers(blocks: Block) -> list[Block]:
    n = jax.tree.leaves(blocks)[0].shape[0]
    return [jax.tree.map(lambda x, k=k: x[k], blocks) for k in range(n)]


def _choose_experts(
    block: Block, x_BTD: jax.Array, context: LayerContext, bias_E: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    if not isinstance(block.ffn, DomainExperts):
        return None
    assert context.router is not None
    assert bias_E is not None
    y = block.attention(block.attention_norm(x_BTD), context.position_BT, context.segment_BT, context.profile)
    return block.ffn.choose(block.ffn_norm(x_BTD + y), context.router, bias_E)


def _weigh_slots(block: Block, x_BTD: jax.Array, context: LayerContext) -> tuple[jax.Array, jax.Array | None]:
    """`[B, N, T, S]`, the weights of the slots in what each head reads, and `[B, N, T, M]`, those of the profile."""
    attention, personal = block.attention, block.attention.personal
    profile = context.profile if personal is not None else None
    q, rotated, k, _ = attention.project(block.attention_norm(x_BTD), context.position_BT, profile)
    scale, n_shared = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    k = jnp.repeat(k, n_shared, axis=2)
    logit_BNTS = jnp.einsum("BTNH,BSNH->BNTS", rotated, k, preferred_element_type=jnp.float32) * scale
    if personal is not None:
        assert profile is not None
        logit_BNTS += _bias_slots(personal, profile)
    mask_B1TS = causal_segment_mask(context.segment_BT, attention.window)[:, None]
    logit_BNTS = jnp.where(mask_B1TS, logit_BNTS, MASK_VALUE)
    weight_BNTS = jax.nn.softmax(logit_BNTS)
    if personal is None or personal.key_DNH is None:
        return weight_BNTS, None
    assert profile is not None
    assert personal.gate_N is not None
    logit_BTNM = profile.slots.project(personal.key_DNH[...], q.dtype).score(q) * scale
    logit_BNTM = jnp.moveaxis(logit_BTNM + profile.log_relevance_BTM[:, :, None], 2, 1)
    both = jax.nn.softmax(jnp.concatenate([logit_BNTS, logit_BNTM], axis=-1))
    gate_N = jnp.tanh(personal.gate_N[...])[:, None, None]
    if profile.known_BT is not None:
        gate_N = gate_N * profile.known_BT[:, None, :, None]
    n_slots = logit_BNTS.shape[-1]
    weight_BNTS = (1 - gate_N) * weight_BNTS + gate_N * both[..., :n_slots]
    return weight_BNTS, gate_N * both[..., n_slots:]


def _bias_slots(personal, profile: ProfileContext) -> jax.Array:
    """What a personal layer adds to the logits `[B, N, T, S]`."""
    bias = jnp.zeros((1, 1, 1, 1))
    if personal.time_bias_NX is not None:
        bucket_BTS = find_bucket(profile.time_BT[:, None], profile.time_BT[:, :, None], N_GAPS + 1)
        bias = bias + jnp.moveaxis(personal.time_bias_NX[...].T[bucket_BTS], 3, 1)
    group_BTNG = personal.group_bias(profile)
    if group_BTNG is not None:
        index = profile.service_BT[:, None, None]  # of the slots that are attended to
        bias = bias + jnp.moveaxis(jnp.take_along_axis(group_BTNG, index, axis=-1), 2, 1)
    return bias
