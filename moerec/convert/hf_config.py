"""What the `config.json` of a base model says of its sizes, and which tensors a folder of such a model holds.

Defaults and meanings are those of `transformers` (configuration_*.py and modeling_*.py of qwen2, llama, qwen2_moe). A
field that would make another model of the weights is refused by its name, and never passed over.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moerec.convert.hf_folder import CONFIG_NAME, DTYPES, HFFolder, quote
from moerec.errors import InputError

_MOST_LAYERS = 10_000
_OLD_BUFFER = re.compile(r"model\.layers\.([0-9]{1,5})\.self_attn\.rotary_emb\.inv_freq")
_PACKED = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj")
_SINGLE = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a family's class in `transformers` is called, and defaults in which the families differ."""

    architecture: str
    max_positions: int
    n_kv_heads: int | None = None


_FAMILIES = {
    "qwen2": _Family("Qwen2ForCausalLM", max_positions=32768, n_kv_heads=32),
    "llama": _Family("LlamaForCausalLM", max_positions=2048),
    "qwen2_moe": _Family("Qwen2MoeForCausalLM", max_positions=32768, n_kv_heads=16),
}


@dataclasses.dataclass(frozen=True)
class MoEShape:
    """Of the mixture layers of a Qwen2-MoE.

    Attributes:
      layers: which ones they are, from 0, rising.
      d_expert: width of an expert. d_shared: width of the expert that all tokens go through.
      renormalise: whether the weights of the experts chosen are made to add up to one.
    """

    layers: tuple[int, ...]
    n_experts: int
    n_active: int
    d_expert: int
    d_shared: int
    renormalise: bool


@dataclasses.dataclass(frozen=True)
class HFShape:
    """The sizes of a base model.

    Attributes:
      family: "qwen2", "llama" or "qwen2_moe".
      d_ff: width of the dense layers' feed-forward part.
      tied: whether the output projection is the table of the embeddings.
      dtype: "bfloat16" and so on, as the file says it; None where it says nothing. The weights may be of another.
      moe: None without mixture layers.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    tied: bool
    qkv_bias: bool
    max_positions: int
    dtype: str | None = None
    moe: MoEShape | None = None


class _Fields:
    """The fields of an object of a `config.json`, each checked when it is taken; the first one at fault is told."""

    def __init__(self, config: Mapping[str, Any], path: Path, prefix: str = ""):
        """Args: prefix: of the fields' names in messages, where the object is in another."""
        self.config, self.path, self.prefix = config, path, prefix

    def refuse(self, name: str, reason: str) -> NoReturn:
        raise InputError(f"{self.path}: {self.prefix}{name} is {quote(self.config.get(name))}: {reason}")

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def take_int(self, name: str, default: int | None = None, least: int = 1, most: int | None = None) -> int:
        """Args: default: None where the field must be there."""
        if name not in self.config and default is None:
            raise InputError(f"{self.path}: {self.prefix}{name} is missing")
        value = self.config.get(name, default)
        if type(value) is not int or value < least or (most is not None and value > most):
            self.refuse(name, f"it must be a whole number from {least} {f'to {most}' if most is not None else 'on'}")
        return value

    def take_float(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(name, "it must be a number above 0")
        return float(value)

    def take_bool(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "it must be true or false")
        return value


def read_shape(config: Mapping[str, Any], path: Path) -> HFShape:
    """The shape of the model that a `config.json` describes.

    Args: path: where it was read from, for messages.

    Raises:
      InputError: a field is missing, is of a wrong type, or asks for a model that is not computed here.
    """
    fields = _Fields(config, path)
    family = _find_family(fields)
    n_layers = fields.take_int("num_hidden_layers", most=_MOST_LAYERS)
    _refuse_other_models(fields, family, n_layers)
    n_heads, n_kv_heads, d_head = _read_heads(fields, family)
    moe = _read_moe(fields, n_layers) if family == "qwen2_moe" else None
    all_mixtures = moe is not None and len(moe.layers) == n_layers
    dtype_field = "dtype" if fields.has("dtype") else "torch_dtype"
    if not isinstance(config.get(dtype_field), str | None):
        fields.refuse(dtype_field, "it must be the name of a dtype")
    return HFShape(
        family=family,
        n_layers=n_layers,
        d_model=fields.take_int("hidden_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_ff=fields.take_int("intermediate_size", 5632 if all_mixtures else None),
        vocab_size=fields.take_int("vocab_size"),
        norm_eps=fields.take_float("rms_norm_eps", 1e-6),
        rope_theta=_read_rope_theta(fields),
        tied=fields.take_bool("tie_word_embeddings", False),
        qkv_bias=fields.take_bool("qkv_bias", True) if family == "qwen2_moe" else family == "qwen2",
        max_positions=fields.take_int("max_position_embeddings", _FAMILIES[family].max_positions),
        dtype=config.get(dtype_field),
        moe=moe,
    )


def _find_family(fields: _Fields) -> str:
    known = ", ".join(_FAMILIES)
    if fields.has("model_type"):
        family = fields.config["model_type"]
        if not isinstance(family, str) or family not in _FAMILIES:
            fields.refuse("model_type", f"known are {known}")
        return family
    architectures = fields.config.get("architectures")
    if architectures is None:
        raise InputError(f"{fields.path}: model_type is missing; known are {known}")
    for family, described in _FAMILIES.items():
        if architectures == [described.architecture]:
            return family
    fields.refuse("architectures", f"known are {', '.join(x.architecture for x in _FAMILIES.values())}")


def _refuse_other_models(fields: _Fields, family: str, n_layers: int) -> None:
    """Refuses what would make something else of the same weights than is computed here."""
    config = fields.config
    if fields.has("quantization_config"):
        fields.refuse("quantization_config", "quantised weights are not read")
    if config.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only silu is computed")
    if config.get("is_causal", True) is not True:
        fields.refuse("is_causal", "only causal attention is computed")
    if fields.has("use_sliding_window") and fields.take_bool("use_sliding_window", False):
        fields.refuse("use_sliding_window", "attention over a window is not computed")
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * n_layers:
        fields.refuse("layer_types", f"it must be full_attention for each of the {n_layers} layers")
    if family == "llama":
        for name in ("attention_bias", "mlp_bias"):
            if fields.take_bool(name, False):
                fields.refuse(name, "such biases are not computed in a llama")
        if fields.has("pretraining_tp") and fields.take_int("pretraining_tp") != 1:
            fields.refuse("pretraining_tp", "only 1 is computed")


def _read_heads(fields: _Fields, family: str) -> tuple[int, int, int]:
    """`(heads, heads of keys and values, width of a head)`."""
    width, n_heads = fields.take_int("hidden_size"), fields.take_int("num_attention_heads")
    # A default that does not divide the heads makes no model: then, as where there is none, all heads have their own.
    default = _FAMILIES[family].n_kv_heads if "num_key_value_heads" not in fields.config else None
    n_kv_heads = n_heads if default is None or n_heads % default else default
    if fields.has("num_key_value_heads"):
        n_kv_heads = fields.take_int("num_key_value_heads")
    if n_heads % n_kv_heads:
        fields.refuse("num_key_value_heads", f"it must divide the {n_heads} of num_attention_heads")
    told = "head_dim" if fields.has("head_dim") else "hidden_size"
    if told == "hidden_size" and width % n_heads:
        fields.refuse(told, f"without head_dim it must be a multiple of the {n_heads} of num_attention_heads")
    d_head = fields.take_int(told) if told == "head_dim" else width // n_heads
    if d_head % 2:
        fields.refuse(told, f"it makes heads of the odd width {d_head}, which rotary positions cannot turn")
    return n_heads, n_kv_heads, d_head


def _read_rope_theta(fields: _Fields) -> float:
    """The base of the rotary positions: a field of its own in older files, one of `rope_parameters` in newer ones."""
    objects = [fields]
    for name in ("rope_scaling", "rope_parameters"):
        inner = fields.config.get(name)
        if not isinstance(inner, Mapping | None):
            fields.refuse(name, "it must be an object or null")
        objects.append(_Fields(inner or {}, fields.path, f"{name}."))
    found: dict[str, float] = {}
    for rope in objects:
        if rope.config.get("partial_rotary_factor") not in (None, 1):
            rope.refuse("partial_rotary_factor", "only heads that are turned as a whole are computed")
        for key, value in rope.config.items() if rope.prefix else ():
            if key in ("rope_type", "type") and value != "default":
                rope.refuse(key, "only rotary positions without scaling are computed")
            if isinstance(value, Mapping):
                rope.refuse(key, "positions that differ between layers are not computed")
        if rope.has("rope_theta"):
            theta = rope.take_float("rope_theta", 10_000.0)
            if found and theta not in found.values():
                rope.refuse("rope_theta", f"but {next(iter(found))} is {next(iter(found.values())):g}")
            found[f"{rope.prefix}rope_theta"] = theta
    return next(iter(found.values()), 10_000.0)


def _read_moe(fields: _Fields, n_layers: int) -> MoEShape | None:
    """The mixture layers: those that `decoder_sparse_step` counts and that are not among `mlp_only_layers`."""
    named = [name for name in ("num_experts", "num_local_experts") if fields.has(name)]
    counts = [fields.take_int(name, least=0) for name in named] or [60]
    if counts[0] != counts[-1]:
        fields.refuse(named[1], f"but {named[0]} is {counts[0]}")
    step = fields.take_int("decoder_sparse_step", 1)
    dense = fields.config["mlp_only_layers"] if fields.has("mlp_only_layers") else []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < n_layers for layer in dense):
        fields.refuse("mlp_only_layers", f"it must be a list of layers from 0 to {n_layers - 1}")
    layers = tuple(sorted(set(range(step - 1, n_layers, step)) - set(dense)))
    n_active = fields.take_int("num_experts_per_tok", 4)
    moe = MoEShape(
        layers,
        n_experts=counts[0],
        n_active=n_active,
        d_expert=fields.take_int("moe_intermediate_size", 1408),
        d_shared=fields.take_int("shared_expert_intermediate_size", 5632),
        renormalise=fields.take_bool("norm_topk_prob", False),
    )
    if not layers or not moe.n_experts:
        return None
    if n_active > moe.n_experts:
        told = "num_experts_per_tok" if "num_experts_per_tok" in fields.config else named[0]
        fields.refuse(told, f"{n_active} experts of {moe.n_experts} cannot be chosen")
    return moe


def write_config(shape: HFShape, dtype: str) -> dict[str, Any]:
    """A `config.json` for a model that comes from no other, which older and newer `transformers` read.

    Raises:
      InputError: the family has no such model.
    """
    if shape.family not in _FAMILIES:
        raise InputError(f"{shape.family} is no family of models; known are {', '.join(_FAMILIES)}")
    if shape.family != "qwen2_moe" and (shape.moe is not None or shape.qkv_bias != (shape.family == "qwen2")):
        raise InputError(f"{shape.family} has no {'mixtures' if shape.moe else 'choice of qkv_bias'}")
    if dtype not in map(str, DTYPES.values()):
        raise InputError(f"{dtype} is no dtype of weights; known are {', '.join(map(str, DTYPES.values()))}")
    config: dict[str, Any] = {
        "architectures": [_FAMILIES[shape.family].architecture],
        "model_type": shape.family,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        # The families' own would be tokens of their tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.family == "llama":
        return config | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    config["use_sliding_window"] = False
    return config | _write_moe(shape) if shape.family == "qwen2_moe" else config


def _write_moe(shape: HFShape) -> dict[str, Any]:
    moe = shape.moe or MoEShape((), n_experts=0, n_active=1, d_expert=1, d_shared=1, renormalise=False)
    return {
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.n_active,
        "moe_intermediate_size": moe.d_expert,
        "shared_expert_intermediate_size": moe.d_shared,
        "norm_topk_prob": moe.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(shape.n_layers) if layer not in moe.layers],
        "qkv_bias": shape.qkv_bias,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def expected_tensors(shape: HFShape, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The tensors that a folder holds, from below to above.

    Args: names: those that it has. They tell whether experts are packed, and whether a tied model stores its output.
    """
    return dict(_list_expected(shape, set(names)))


def _list_expected(shape: HFShape, names: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, heads, kv_heads = shape.d_model, shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    packed = any(map(_PACKED.fullmatch, names))
    mixtures = set(shape.moe.layers) if shape.moe else set()
    yield "model.embed_tokens.weight", (shape.vocab_size, width)
    for layer in range(shape.n_layers):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (width,)
        for name, size in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{base}.self_attn.{name}_proj.weight", (size, width)
            if shape.qkv_bias:
                yield f"{base}.self_attn.{name}_proj.bias", (size,)
        yield f"{base}.self_attn.o_proj.weight", (width, heads)
        yield f"{base}.post_attention_layernorm.weight", (width,)
        if shape.moe is not None and layer in mixtures:
            yield from _list_mixture(shape.moe, f"{base}.mlp", width, packed)
        else:
            yield from _list_ffn(f"{base}.mlp", width, shape.d_ff)
    yield "model.norm.weight", (width,)
    if not shape.tied or "lm_head.weight" in names:
        yield "lm_head.weight", (shape.vocab_size, width)


def _list_ffn(base: str, width: int, d_ff: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{base}.gate_proj.weight", (d_ff, width)
    yield f"{base}.up_proj.weight", (d_ff, width)
    yield f"{base}.down_proj.weight", (width, d_ff)


def _list_mixture(moe: MoEShape, base: str, width: int, packed: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{base}.gate.weight", (moe.n_experts, width)
    if packed:
        yield f"{base}.experts.gate_up_proj", (moe.n_experts, 2 * moe.d_expert, width)
        yield f"{base}.experts.down_proj", (moe.n_experts, width, moe.d_expert)
    else:
        for expert in range(moe.n_experts):
            yield from _list_ffn(f"{base}.experts.{expert}", width, moe.d_expert)
    yield from _list_ffn(f"{base}.shared_expert", width, moe.d_shared)
    yield f"{base}.shared_expert_gate.weight", (1, width)


def check_tensors(folder: HFFolder, shape: HFShape) -> None:
    """Whether a folder holds the tensors of that shape, all of them and no others.

    Raises:
      InputError: the first one that is missing, too many or of another shape; or experts that are stored both ways.
    """
    single, packed = (next(filter(way.fullmatch, folder.tensors), None) for way in (_SINGLE, _PACKED))
    if single and packed:
        raise InputError(f"{folder.path}: has experts both packed ({quote(packed)}) and one by one ({quote(single)})")
    expected = {}
    for name, wanted in _list_expected(shape, set(folder.tensors)):
        if name not in folder.tensors:
            raise InputError(f"{folder.path}: lacks tensor {quote(name)}, of shape {quote(wanted)} by {CONFIG_NAME}")
        expected[name] = wanted
    for name, info in folder.tensors.items():
        old = _OLD_BUFFER.fullmatch(name)
        if name not in expected and not (old and int(old[1]) < shape.n_layers):
            raise InputError(f"{info.file}: tensor {quote(name)} belongs to no model such as {CONFIG_NAME} describes")
        if name in expected and info.shape != expected[name]:
            found = f"has the shape {quote(info.shape)}, but by {CONFIG_NAME} it is {quote(expected[name])}"
            raise InputError(f"{info.file}: tensor {quote(name)} {found}")
