"""Requests' slots asked under several hypotheses, against keys and values of the past that are computed once.

Letters: Q requests' slots, X hypotheses of each, S slots of the row that a request's slot stands in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moerec.nn.attention import Attention, ProfileAttention, ProfileContext, causal_segment_mask
from moerec.nn.layers import MASK_VALUE
from moerec.nn.moe.router import RouterInputs
from moerec.nn.temporal import N_GAPS
from moerec.types import Batch
from pallas_kernels.attention import attend_few, find_bucket, merge


class AskedSlots(NamedTuple):
    """Where the requests' slots stand, and what of their rows they see.

    Attributes:
      flat_Q: int32 flat slots. row_Q: int32 rows of the batch.
      position_Q1: int32 places within the own sequence.
      seen_QS: bool, the slots of the row up to the own one. past_QS: the same without the own one.
      time_Q1, time_QS: int32 times of the own event and of the row's. service_QS: int32 services of the row's events.
      profile: of the slots, its leading axes `[Q, 1]`; None in a model that is not personal.
      router: what the routers know of each slot under each hypothesis, `[Q, X]`; None without experts.
    """

    flat_Q: jax.Array
    row_Q: jax.Array
    position_Q1: jax.Array
    seen_QS: jax.Array
    past_QS: jax.Array
    time_Q1: jax.Array
    time_QS: jax.Array
    service_QS: jax.Array
    profile: ProfileContext | None = None
    router: RouterInputs | None = None


def place_asked(batch: Batch, flat_Q: jax.Array, window: int, profile: ProfileContext | None) -> AskedSlots:
    """The slots of a batch that are asked.

    Args: int32 flat slots; the attention's window (0 is none); what personal layers see at all slots `[B, T]`.
    """
    n_slots = batch.item_BT.shape[1]
    row_Q, slot_Q = flat_Q // n_slots, flat_Q % n_slots
    seen_QS = causal_segment_mask(batch.segment_BT, window)[row_Q, slot_Q]

    def pick(x_BTX):
        return x_BTX.reshape(-1, *x_BTX.shape[2:])[flat_Q][:, None]

    own = None
    if profile is not None:
        slots = profile.slots
        field = None if slots.field_XNH is None else pick(slots.field_XNH)
        slots = slots._replace(mean_XOP=pick(slots.mean_XOP), evidence_XO=pick(slots.evidence_XO), field_XNH=field)
        rest = (profile.time_BT, profile.service_BT, profile.log_relevance_BTM, profile.summary_BTD)
        time, service, relevance, summary = map(pick, rest)
        own = ProfileContext(time, service, slots, relevance, summary)
    return AskedSlots(
        flat_Q,
        row_Q,
        pick(batch.position_BT),
        seen_QS,
        seen_QS & (jnp.arange(n_slots) != slot_Q[:, None]),
        pick(batch.time_BT),
        batch.time_BT[row_Q],
        batch.service_BT[row_Q],
        own,
    )


def attend_asked(
    attention: Attention, y_QXD: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, asked: AskedSlots
) -> jax.Array:
    """`[Q, X, D]`, attention of asked slots to the past and, under each hypothesis, to itself: what the layer gives a
    sequence's last slot in `Attention.__call__`.

    Args: normalised states of the asked slots; the layer's keys and values of all slots, after rotation.
    """
    position_QX = jnp.broadcast_to(asked.position_Q1, y_QXD.shape[:2])
    q, rotated, k, v = attention.project(y_QXD, position_QX, asked.profile)
    (n_asked, n_hypotheses, n_heads, h), heads = q.shape, k.shape[2]
    past_k, past_v = k_BSKH[asked.row_Q], v_BSKH[asked.row_Q]
    grouped = rotated.reshape(n_asked, n_hypotheses, heads, n_heads // heads, h)

    def per_head(x):
        return x.reshape(n_asked, n_hypotheses, n_heads, *x.shape[4:])

    def dot(spec, *operands):
        return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)

    logit_QXNS = per_head(dot("QXKGH,QSKH->QXKGS", grouped, past_k)) * h**-0.5
    logit_QXN = per_head(dot("QXKGH,QXKH->QXKG", grouped, k)) * h**-0.5
    if attention.personal is not None:
        assert asked.profile is not None
        past_bias, own_bias = bias_asked(attention.personal, asked)
        logit_QXNS, logit_QXN = logit_QXNS + past_bias, logit_QXN + own_bias
    logit_QXNS = jnp.where(asked.past_QS[:, None, None], logit_QXNS, MASK_VALUE)

    def read(weight_QXNS):
        weight = weight_QXNS.reshape(*grouped.shape[:-1], -1).astype(past_v.dtype)
        return per_head(dot("QXKGS,QSKH->QXKGH", weight, past_v))

    own_v = jnp.broadcast_to(v[:, :, :, None], grouped.shape).reshape(q.shape).astype(jnp.float32)
    out, lse = merge([attend_few(logit_QXNS, read), (own_v, logit_QXN)])
    out = out.astype(q.dtype)
    if attention.personal is not None:
        assert asked.profile is not None
        out = attention.personal.join_prefix(q, out, lse, asked.profile)
    return attention.project_out(out)


def bias_asked(personal: ProfileAttention, asked: AskedSlots) -> tuple[jax.Array, jax.Array]:
    """What a personal layer adds to the logits of past events, `[Q, 1, N, S]`, and of the own one, `[Q, 1, N]`."""
    assert asked.profile is not None
    past, own = jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1))
    if personal.time_bias_NX is not None:
        bias_XN = personal.time_bias_NX[...].T
        past = past + jnp.moveaxis(bias_XN[find_bucket(asked.time_QS, asked.time_Q1, N_GAPS + 1)], 2, 1)[:, None]
        own = own + bias_XN[find_bucket(asked.time_Q1, asked.time_Q1, N_GAPS + 1)]
    group_bias_Q1NG = personal.group_bias(asked.profile)
    if group_bias_Q1NG is not None:
        past = past + jnp.take_along_axis(group_bias_Q1NG, asked.service_QS[:, None, None], axis=-1)
        own = own + jnp.take_along_axis(group_bias_Q1NG, asked.profile.service_BT[..., None, None], axis=-1)[..., 0]
    return past, own
