"""The weights of a text model as decoding reads them: matrices of one input side by side, layers apart.

Nothing of them is trained. They are in arrays of their own; whoever loads a model for decoding alone drops it then.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moerec.config import ModelConfig
from moerec.errors import InputError
from moerec.nn.block import Block, split_layers
from moerec.nn.layers import RMSNorm, SwiGLU
from moerec.nn.model import SequenceModel
from moerec.nn.moe.experts import DomainExperts
from moerec.serve.generate.matmul import Matrix, quantize


class DenseWeights(NamedTuple):
    """A gated feed-forward. Attributes: gate_up: both in one, or two on a mesh. down."""

    gate_up: tuple[Matrix, ...]
    down: Matrix


class ExpertWeights(NamedTuple):
    """The experts that are open to text: of a model with services those of the cross group.

    Attributes:
      router_ED, bias_E: float32. gate, up, down: each of all experts. shared, shared_gate_D: the one that sees all
      tokens, and its gate; or None.
    """

    router_ED: jax.Array
    bias_E: jax.Array
    gate: Matrix
    up: Matrix
    down: Matrix
    shared: DenseWeights | None
    shared_gate_D: jax.Array | None


class LayerWeights(NamedTuple):
    """Attributes: qkv: queries, keys and values in one, or three on a mesh; qkv_bias, too, or (). out.
    experts is None where the layer is dense, dense where it has no experts but those of services.
    """

    attention_norm: RMSNorm
    qkv: tuple[Matrix, ...]
    qkv_bias: tuple[jax.Array, ...]
    out: Matrix
    ffn_norm: RMSNorm
    dense: DenseWeights | None
    experts: ExpertWeights | None


class TextWeights(NamedTuple):
    """Attributes: embedding and head (None: the same), their rows the tokens'; layers; final_norm."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    final_norm: RMSNorm
    head: Matrix | None


def make_weights(
    model: SequenceModel,
    router_bias_LE: jax.Array | None = None,
    dtype: str = "float32",
    is_quantized: bool = False,
    mesh: Mesh | None = None,
) -> TextWeights:
    """What text needs of a model, in a type of `dtype`, all but norms, biases and routers.

    Args:
      is_quantized: matrices are whole numbers of a byte. mesh: heads, widths and rows of tokens are split over
        `model`, experts over `expert`; None is one device.

    Raises:
      InputError: the model has no text head.
    """
    if model.token_encoder is None or model.text_head is None:
        raise InputError("the model has no text head (model.text.vocab_size): it knows no words to go on with")
    make = _Maker(model.config, jnp.dtype(dtype), is_quantized, mesh)
    layers, n_mixtures = [], 0
    for blocks, group in zip(model.groups, split_layers(model.config), strict=True):
        for layer in range(group.last - group.first):
            block = jax.tree.map(lambda a, layer=layer: a[layer], blocks)
            bias_E = None if router_bias_LE is None or not group.experts else router_bias_LE[n_mixtures]
            layers.append(make.layer(block, bias_E))
            n_mixtures += group.experts
    head = model.text_head.row_VD
    return TextWeights(
        make.matrix(model.token_encoder.row_VD, 0, "model", is_table=True),
        tuple(layers),
        make.whole(model.final_norm),
        None if head is None else make.matrix(head, 0, "model"),
    )


class _Maker(NamedTuple):
    """Places arrays and gives them their type."""

    config: ModelConfig
    dtype: jnp.dtype
    is_quantized: bool
    mesh: Mesh | None

    def whole(self, tree):
        """On every device."""
        return self.place(jax.tree.map(lambda a: a.astype(jnp.float32), tree), PartitionSpec())

    def place(self, tree, spec: PartitionSpec):
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, spec))

    def matrix(
        self, w: nnx.Param | jax.Array, split: int, axis: str | None, experts: bool = False, is_table: bool = False
    ) -> Matrix:
        """Args: `[X, D]` or `[E, X, D]`; which of X and D is split, and over which axis of the mesh; whether rows are
        looked up.
        """
        w = w[...] if isinstance(w, nnx.Param) else w
        if self.is_quantized:
            matrix = quantize(Matrix(w))
        elif self.dtype == jnp.float32 and not is_table:
            matrix = Matrix(jnp.swapaxes(w, -1, -2).astype(self.dtype), inputs_first=True)
        else:
            matrix = Matrix(w.astype(self.dtype))
        if self.mesh is None:
            return matrix
        lead = ("expert",) if experts and w.shape[0] % self.mesh.shape["expert"] == 0 else (None,) * experts
        fits = axis is not None and w.shape[split + experts] % self.mesh.shape[axis] == 0
        names = [axis if fits and split == place else None for place in (0, 1)]
        w_XD = self.place(matrix.w_XD, PartitionSpec(*lead, *(names[::-1] if matrix.inputs_first else names)))
        scale_X = self.place(matrix.scale_X, PartitionSpec(*lead, names[0])) if self.is_quantized else None
        return dataclasses.replace(matrix, w_XD=w_XD, scale_X=scale_X)

    def side_by_side(self, parts: list[jax.Array]) -> tuple[Matrix, ...]:
        """Matrices `[X, D]` that read the same; on a mesh each is split by itself."""
        parts = [jnp.concatenate(parts)] if self.mesh is None else parts
        return tuple(self.matrix(part, 0, "model") for part in parts)

    def layer(self, block: Block, bias_E: jax.Array | None) -> LayerWeights:
        attention, d = block.attention, self.config.d_model
        projections = (attention.q_DNH, attention.k_DKH, attention.v_DKH)
        heads = [w[...].reshape(d, -1).T for w in projections]
        biases = (attention.q_bias_NH, attention.k_bias_KH, attention.v_bias_KH)
        flat = [b[...].reshape(-1) for b in biases if b is not None]
        flat = [jnp.concatenate(flat)] if flat and self.mesh is None else flat
        return LayerWeights(
            self.whole(block.attention_norm),
            self.side_by_side(heads),
            tuple(self.place(b, PartitionSpec()) for b in flat),
            self.matrix(attention.o_NHD[...].reshape(-1, d).T, 1, "model"),
            self.whole(block.ffn_norm),
            None if isinstance(block.ffn, DomainExperts) else self.dense(block.ffn),
            self.experts(block.ffn, bias_E) if isinstance(block.ffn, DomainExperts) else None,
        )

    def dense(self, ffn: SwiGLU) -> DenseWeights:
        down = self.matrix(ffn.down_FD[...].T, 1, "model")
        return DenseWeights(self.side_by_side([ffn.gate_DF[...].T, ffn.up_DF[...].T]), down)

    def experts(self, ffn: DomainExperts, bias_E: jax.Array | None) -> ExpertWeights:
        moe = self.config.moe
        n_all = ffn.router_ED.shape[0]
        first = n_all - moe.n_per_group * moe.cross  # of the experts that text may use, which may be none
        bias_E = jnp.zeros(n_all) if bias_E is None else bias_E

        def stack(w: nnx.Param, split: int) -> Matrix:
            return self.matrix(jnp.swapaxes(w[first:], 1, 2), split, "model", experts=True)

        gate = ffn.shared_gate_D
        return ExpertWeights(
            self.whole(ffn.router_ED[first:]),
            self.whole(bias_E[first:]),
            stack(ffn.gate_EDF, 0),
            stack(ffn.up_EDF, 0),
            stack(ffn.down_EFD, 1),
            None if ffn.shared is None else self.dense(ffn.shared),
            None if gate is None else self.whole(gate[...]),
        )
