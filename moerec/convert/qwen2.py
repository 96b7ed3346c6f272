"""Language models of the Qwen2 family between Hugging Face's tensors and ours: dense, without biases, and mixtures.

A matrix is `[out, in]` there and `[in, ...]` here; layers stand stacked here, and so do experts. Everything goes block
by block, so that no tensor is in memory whole beside the model.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moerec.config import ModelConfig, MoEConfig, TextConfig
from moerec.convert.hf_config import HFShape, MoEShape
from moerec.convert.hf_folder import HFFolder
from moerec.convert.mesh_arrays import MeshArrayWriter
from moerec.convert.paths import flatten, unflatten
from moerec.errors import InputError
from moerec.nn.block import split_layers
from moerec.nn.model import TEXT_SIZES, SequenceModel
from moerec.nn.sharding import param_shardings

BLOCK_BYTES = 16 << 20  # of a tensor that are in memory at once, if a row is not larger
# What a base model's sizes and a model's config call alike.
SHAPE_FIELDS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "rope_theta", "norm_eps", "qkv_bias")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class Place(NamedTuple):
    """Where a tensor, or a part of each of its rows, stands in a parameter.

    Attributes:
      path: of the parameter, such as `groups/0/attention/q_DNH`.
      at: indices of the leading axes: the layer within its group, and the expert.
      flat: how the rest of the parameter is seen: `[out]` or `[in, out]`, of packed experts `[E, in, out]`.
      is_turned: whether the last two axes are the other way round there.
      part: of packed experts, which rows of each of their matrices.
    """

    path: str
    at: tuple[int, ...]
    flat: tuple[int, ...]
    is_turned: bool = False
    part: slice = slice(None)

    def take(self, first: int, rows: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        """Where rows of the tensor begin in the flat view of the parameter, and the block that they are there."""
        start: tuple[int, ...] = (first, *(0,) * (len(self.flat) - 1))
        block = rows[:, self.part] if rows.ndim == 3 else rows  # of packed experts a row is one expert's matrix
        if self.is_turned:
            start = start if rows.ndim == 3 else (0, first)
            block = np.swapaxes(block, -1, -2)
        elif len(self.flat) == 1:  # also of a matrix of one row, which is a vector here
            block = rows.reshape(-1)
        lead = len(self.at)
        return (*self.at, *start), block.reshape(*(1,) * lead, *block.shape)


def make_model_config(shape: HFShape) -> ModelConfig:
    """The model that a folder of these sizes holds."""
    moe = MoEConfig()
    if shape.moe is not None:
        moe = MoEConfig(
            layers=shape.moe.layers,
            services=False,
            n_per_group=shape.moe.n_experts,
            d_expert=shape.moe.d_expert,
            n_active=shape.moe.n_active,
            renormalise=shape.moe.renormalise,
            reads_domain=False,
            d_shared=shape.moe.d_shared,
            shared_gate=shape.moe.d_shared > 0,
            bias_rate=0.0,
        )
    return ModelConfig(
        **{name: getattr(shape, name) for name in SHAPE_FIELDS},
        dropout=0.0,
        text=TextConfig(vocab_size=shape.vocab_size, tie_head=shape.tied),
        moe=moe,
    )


def make_shape(config: ModelConfig) -> HFShape:
    """The sizes of the base model that a model is: `make_model_config` backwards.

    Raises:
      InputError: it has parts that no model of the family has; says which.
    """
    _refuse_foreign(config)
    moe = None
    if config.moe.layers:
        own = config.moe
        layers = tuple(sorted(own.layers))
        moe = MoEShape(layers, own.n_per_group, own.n_active, own.d_expert, own.d_shared, own.renormalise)
    is_llama = moe is None and not config.qkv_bias
    return HFShape(
        family="qwen2_moe" if moe else "llama" if is_llama else "qwen2",
        **{name: getattr(config, name) for name in SHAPE_FIELDS},
        vocab_size=config.text.vocab_size,
        tied=config.text.tie_head,
        max_positions=32768,
        dtype=None,
        moe=moe,
    )


def _refuse_foreign(config: ModelConfig) -> None:
    moe = config.moe
    reasons = [
        (config.text.vocab_size == 0, "model.text.vocab_size: it knows no words"),
        (bool(config.personal.layers), "model.personal.layers: no layer of Qwen2 is personal"),
        (config.is_asked, "model.ask.from_layer: no layer of Qwen2 is asked under hypotheses"),
        (config.window > 0, "model.window: attention that sees a window alone is not written"),
    ]
    if moe.layers:
        reasons += [
            (moe.services, "model.moe.services: experts of Qwen2-MoE are one group; here each service has its own"),
            (
                moe.reads_domain,
                "model.moe.reads_domain: the routers read the domain's posterior, those of Qwen2-MoE do not",
            ),
            (not moe.shared_gate, "model.moe.shared_gate: Qwen2-MoE has a gated expert that sees every slot"),
        ]
    for is_so, reason in reasons:
        if is_so:
            raise InputError(f"config.{reason}; it has no Hugging Face layout")


def list_places(config: ModelConfig, name: str, packed: bool) -> list[Place]:
    """Where a tensor of that name goes; two places where gates and ups are packed into one.

    Args: packed: whether the experts of a layer are one tensor.

    Raises:
      KeyError: no tensor of a layer is called so.
    """
    d, v = config.d_model, config.text.vocab_size
    top = {
        EMBEDDING: Place("token_encoder/row_VD", (), (v, d)),
        HEAD: Place("text_head/row_VD", (), (v, d)),
        NORM: Place("final_norm/scale", (), (d,)),
    }
    if name in top:
        return [top[name]]
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    layer = int(number)
    g, group = next((g, group) for g, group in enumerate(split_layers(config)) if group.first <= layer < group.last)
    base, at = f"groups/{g}", (layer - group.first,)
    known = _list_attention(config, base, at) | (
        _list_mixture(config, base, at, packed)
        if group.experts
        else _list_ffn("mlp", f"{base}/ffn", at, d, config.d_ff)
    )
    return known[rest]


def _list_attention(config: ModelConfig, base: str, at: tuple[int, ...]) -> dict[str, list[Place]]:
    d, n, k, h = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
    own, found = f"{base}/attention", {}
    for letter, heads, axis in (("q", n, "N"), ("k", k, "K"), ("v", k, "K")):
        found[f"self_attn.{letter}_proj.weight"] = [Place(f"{own}/{letter}_D{axis}H", at, (d, heads * h), True)]
        if config.qkv_bias:
            found[f"self_attn.{letter}_proj.bias"] = [Place(f"{own}/{letter}_bias_{axis}H", at, (heads * h,))]
    return found | {
        "self_attn.o_proj.weight": [Place(f"{own}/o_NHD", at, (n * h, d), True)],
        "input_layernorm.weight": [Place(f"{base}/attention_norm/scale", at, (d,))],
        "post_attention_layernorm.weight": [Place(f"{base}/ffn_norm/scale", at, (d,))],
    }


def _list_ffn(there: str, here: str, at: tuple[int, ...], d: int, f: int) -> dict[str, list[Place]]:
    return {
        f"{there}.gate_proj.weight": [Place(f"{here}/gate_DF", at, (d, f), True)],
        f"{there}.up_proj.weight": [Place(f"{here}/up_DF", at, (d, f), True)],
        f"{there}.down_proj.weight": [Place(f"{here}/down_FD", at, (f, d), True)],
    }


def _list_mixture(config: ModelConfig, base: str, at: tuple[int, ...], packed: bool) -> dict[str, list[Place]]:
    moe, d = config.moe, config.d_model
    e, f, own = moe.n_per_group, moe.d_expert, f"{base}/ffn"
    gate, up, down = (f"{own}/{name}" for name in ("gate_EDF", "up_EDF", "down_EFD"))
    found = {"mlp.gate.weight": [Place(f"{own}/router_ED", at, (e, d))]}
    if moe.d_shared:
        found |= _list_ffn("mlp.shared_expert", f"{own}/shared", at, d, moe.d_shared)
        found["mlp.shared_expert_gate.weight"] = [Place(f"{own}/shared_gate_D", at, (d,))]
    if packed:
        halves = [Place(gate, at, (e, d, f), True, slice(f)), Place(up, at, (e, d, f), True, slice(f, 2 * f))]
        return found | {
            "mlp.experts.gate_up_proj": halves,
            "mlp.experts.down_proj": [Place(down, at, (e, f, d), True)],
        }
    for number in range(e):
        there, here = f"mlp.experts.{number}", (*at, number)
        found |= {
            f"{there}.gate_proj.weight": [Place(gate, here, (d, f), True)],
            f"{there}.up_proj.weight": [Place(up, here, (d, f), True)],
            f"{there}.down_proj.weight": [Place(down, here, (f, d), True)],
        }
    return found


def is_packed(names: Collection[str]) -> bool:
    """Whether the experts of a layer are one tensor."""
    return any(name.endswith("mlp.experts.gate_up_proj") for name in names)


def import_folder(folder: HFFolder, shape: HFShape, mesh: Mesh) -> SequenceModel:
    """The model that a folder holds, its parameters float32, read block by block straight into the mesh's shards.

    The folder has to be one that `check_tensors` has let pass.

    Raises:
      InputError: the output projection of a tied model is there, and is not the table of the embeddings; or numbers are
        not finite.
    """
    config = make_model_config(shape)
    like = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), config, TEXT_SIZES))
    shardings, shapes = flatten(param_shardings(like, mesh)), flatten(like)
    packed = is_packed(folder.tensors)
    by_path: dict[str, list[tuple[str, Place]]] = {}
    for name in folder.tensors:
        if name == HEAD and shape.tied:
            _require_same(folder, HEAD, EMBEDDING)
            continue
        if not is_weight(name):
            continue
        for place in list_places(config, name, packed):
            by_path.setdefault(place.path, []).append((name, place))
    leaves = {}
    for path, parts in by_path.items():  # one parameter after another, so that a matrix is begun when it is needed
        place = parts[0][1]
        leaf_shape = shapes[path].shape
        writer = MeshArrayWriter(leaf_shape, shardings[path], (*leaf_shape[: len(place.at)], *place.flat))
        for name, place in parts:
            for first, rows in folder.iter_blocks(name, BLOCK_BYTES):
                if not np.isfinite(rows).all():
                    raise InputError(f"{folder.tensors[name].file}: {name} has numbers that are not finite")
                writer.write(*place.take(first, rows))
        leaves[path] = writer.finish()
    missing = sorted(shapes.keys() - leaves.keys())
    if missing:
        raise InputError(f"{folder.path}: no tensor there is {missing[0]}")
    return unflatten(like, leaves)


def is_weight(name: str) -> bool:
    """Whether a tensor is a parameter, and not a table of angles that old files have."""
    return not name.endswith("rotary_emb.inv_freq")


def _require_same(folder: HFFolder, name: str, other: str) -> None:
    """Raises: InputError, where two tensors differ."""
    info, twin = folder.tensors[name], folder.tensors[other]
    is_same = (info.shape, info.dtype) == (twin.shape, twin.dtype)
    if is_same:
        pairs = zip(folder.iter_blocks(name, BLOCK_BYTES), folder.iter_blocks(other, BLOCK_BYTES), strict=True)
        is_same = all(a.tobytes() == b.tobytes() for (_, a), (_, b) in pairs)
    if not is_same:
        raise InputError(f"{info.file}: {name} differs from {other}, and config.json says that the two are tied")


def read_blocks(
    model: SequenceModel, name: str, shape: tuple[int, ...], dtype: np.dtype, packed: bool
) -> Iterator[np.ndarray]:
    """A tensor of a model as a folder has it, a few rows at a time: `import_folder` backwards.

    Raises:
      InputError: numbers are not finite, or too large for the type.
    """
    config, leaves = model.config, flatten(model)
    places = [Place("token_encoder/row_VD", (), shape)] if name == HEAD and config.text.tie_head else None
    places = list_places(config, name, packed) if places is None else places
    row_size = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(np.float32).itemsize
    step = max(1, BLOCK_BYTES // row_size)
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        is_row = len(shape) == 2 and len(places[0].flat) == 1
        parts = [_read_rows(leaves[place.path], place, first, last, is_row) for place in places]
        rows = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(rows.reshape(last - first, *shape[1:])).astype(dtype)
        if not np.isfinite(narrow).all():
            raise InputError(f"{name}: has numbers that are not finite in {dtype}")
        yield narrow


def _read_rows(leaf: jax.Array, place: Place, first: int, last: int, is_row: bool) -> np.ndarray:
    """Rows of a tensor out of the parameter that it stands in. Args: is_row: whether it is a vector as a matrix."""
    n, flat = last - first, place.flat
    starts: tuple[int, ...] = (first, *(0,) * (len(flat) - 1))
    sizes: tuple[int, ...] = (n, *flat[1:])
    if place.is_turned and len(flat) == 2:
        starts, sizes = (0, first), (flat[0], n)
    elif is_row:
        sizes = flat
    view = (*leaf.shape[: len(place.at)], *flat)
    lead = len(place.at)
    block = _slice(leaf, view, (*(1,) * lead, *sizes), tuple(np.int32(x) for x in (*place.at, *starts)))
    rows = np.asarray(block).reshape(sizes)
    return np.swapaxes(rows, -1, -2) if place.is_turned else rows


@partial(jax.jit, static_argnums=(1, 2))
def _slice(leaf: jax.Array, view: tuple[int, ...], sizes: tuple[int, ...], starts: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(leaf.reshape(view), starts, sizes)
