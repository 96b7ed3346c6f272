"""Logits of token sequences by a model of text alone."""

import jax
import jax.numpy as jnp
import numpy as np

from moerec.data.packing import assemble_words
from moerec.nn.block import LayerContext
from moerec.nn.model import SequenceModel
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.router import RouterInputs
from moerec.types import NO_ITEMS, Batch


def make_text_batch(token_BT: np.ndarray, segment_BT: np.ndarray | None = None) -> Batch:
    """A batch of words. Args: int32 tokens; int32 segments, 0 is padding; None: each row is one sequence.

    A slot's position is its place in its segment, whatever stands before: of padding on the left, or other documents.
    """
    token_BT = np.asarray(token_BT, np.int32)
    segment_BT = np.ones_like(token_BT) if segment_BT is None else np.asarray(segment_BT, np.int32)
    place_BT = np.broadcast_to(np.arange(token_BT.shape[1], dtype=np.int32), token_BT.shape)
    is_first_BT = np.diff(segment_BT, axis=1, prepend=-1) != 0
    position_BT = place_BT - np.maximum.accumulate(np.where(is_first_BT, place_BT, 0), axis=1)
    real_BT = segment_BT > 0
    return assemble_words(np.where(real_BT, token_BT, 0), np.where(real_BT, position_BT, 0), segment_BT)


def encode_text(model: SequenceModel, batch: Batch, router_bias_LE: jax.Array | None = None) -> jax.Array:
    """`[B, T, D]` float32 states of the last layer, after the final norm."""
    return model.encode(batch, NO_ITEMS, router_bias_LE=router_bias_LE).state_BTD


@jax.jit
def compute_logits(model: SequenceModel, batch: Batch) -> jax.Array:
    """`[B, T, V]` float32 logits of the next token."""
    assert model.text_head is not None
    assert model.token_encoder is not None
    return model.text_head.score(encode_text(model, batch), model.token_encoder)


@jax.jit
def trace_hidden(model: SequenceModel, batch: Batch) -> list[jax.Array]:
    """`n_layers + 1` arrays `[B, T, D]`, the residual stream of the embedding and after each layer: to find where two
    models part.
    """
    assert model.token_encoder is not None
    assert batch.token_BT is not None
    real_BT = batch.segment_BT > 0
    router = RouterInputs(None, jnp.full(real_BT.shape, -1), real_BT)
    context = LayerContext(batch.position_BT, batch.segment_BT, router)
    hidden = [model.token_encoder(batch.token_BT)]
    for blocks in model.groups:
        for layer in range(jax.tree.leaves(blocks)[0].shape[0]):
            block = jax.tree.map(lambda x, layer=layer: x[layer], blocks)
            bias_E = jnp.zeros(block.ffn.router_ED.shape[0]) if isinstance(block.ffn, DomainExperts) else None
            hidden.append(block(hidden[-1], context, bias_E)[0])
    return hidden
