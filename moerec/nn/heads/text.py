"""p(token): a softmax over the text vocabulary, its rows the tokens' embedding or the head's own."""

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.embeddings import STDDEV, TokenEncoder
from moerec.nn.heads.vocab_xent import chunked_vocab_xent
from moerec.nn.layers import declare, normal


class TextHead(nnx.Module):
    """Scores of tokens against a state, without a bias, as in Qwen2."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        shape = config.text.vocab_size, config.d_model
        is_tied = config.text.tie_head
        init = normal(STDDEV)
        self.row_VD = None if is_tied else declare(key, shape, ("vocab", "embed"), init, decay="embedding")
        self.dtype = jnp.dtype(config.compute_dtype)

    def _rows(self, tied: TokenEncoder) -> nnx.Param:
        return tied.row_VD if self.row_VD is None else self.row_VD

    def score(self, state_XD: jax.Array, tied: TokenEncoder) -> jax.Array:
        """`[..., V]` float32 logits of all tokens. Args: states `[..., D]`; the embedding, for a tied head."""
        rows_VD = self._rows(tied)[...].astype(self.dtype)
        return jnp.einsum("...D,VD->...V", state_XD.astype(self.dtype), rows_VD, preferred_element_type=jnp.float32)

    def sum_nll(
        self, state_SD: jax.Array, label_S: jax.Array, weight_S: jax.Array, tied: TokenEncoder, chunk: int
    ) -> jax.Array:
        """The weighted sum of the labels' negative log-probabilities; logits `[S, V]` never stand in memory.

        Args: states; int32 tokens; float32 weights, without gradient; tokens whose logits are formed at once.
        """
        rows = self._rows(tied)
        axes = rows.get_metadata()["axes"]
        return chunked_vocab_xent(state_SD.astype(self.dtype), rows[...], label_S, weight_S, chunk, axes)
