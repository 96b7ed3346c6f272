"""The optimiser, from its config: clipping, AdamW with a decay mask, a schedule, and groups of parameters by path."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moerec.config import OptimConfig
from moerec.convert.paths import first_match, flatten, name_path
from moerec.errors import InputError

DECAYED, PLAIN = "decayed", "plain"  # what weight decay touches, and what it does not


class Layout(NamedTuple):
    """Where the leaves of a tree stand in vectors.

    Attributes:
      treedef: of the tree. shapes: of its leaves. is_decayed: which of them stand in the vector of what is decayed.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    is_decayed: tuple[bool, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTree:
    """A tree like that of the parameters as two vectors.

    An optimiser does the same to every number. Leaf by leaf that is hundreds of small operations, which a CPU takes
    longer to start than to do, and XLA a quarter of a step's time of compilation.
    """

    vectors: dict[str, Any]
    layout: Layout = dataclasses.field(metadata={"static": True})


def lay_out(params, config: OptimConfig) -> Layout:
    """The layout of the parameters and of all trees like them."""
    leaves, treedef = jax.tree.flatten(params)
    decayed = jax.tree.leaves(decay_mask(params, config.decay_embeddings))
    return Layout(treedef, tuple(leaf.shape for leaf in leaves), tuple(decayed))


def pack(tree, layout: Layout) -> PackedTree:
    """The vectors of a tree; of NumPy arrays they are NumPy's."""
    leaves = jax.tree.leaves(tree)
    join = np.concatenate if isinstance(leaves[0], np.ndarray) else jnp.concatenate
    vectors = {}
    for name, is_decayed in ((DECAYED, True), (PLAIN, False)):
        chosen = [x.reshape(-1) for x, own in zip(leaves, layout.is_decayed, strict=True) if own == is_decayed]
        if chosen:
            vectors[name] = join(chosen)
    return PackedTree(vectors, layout)


def unpack(packed: PackedTree):
    """The tree of vectors: its leaves are parts of them."""
    sizes, leaves = [int(np.prod(shape)) for shape in packed.layout.shapes], []
    ends = {DECAYED: 0, PLAIN: 0}
    for shape, size, is_decayed in zip(packed.layout.shapes, sizes, packed.layout.is_decayed, strict=True):
        name = DECAYED if is_decayed else PLAIN
        leaves.append(packed.vectors[name][ends[name] : ends[name] + size].reshape(shape))
        ends[name] += size
    return jax.tree.unflatten(packed.layout.treedef, leaves)


def is_packed(x: Any) -> bool:
    """Whether a part of a tree is `PackedTree`."""
    return isinstance(x, PackedTree)


def find_layout(tree) -> Layout | None:
    """The layout of what is packed in a tree; None where nothing is."""
    found = (x.layout for x in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(x))
    return next(found, None)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine, linear or constant down to `final_rate` of the peak at the last step."""
    peak, end = config.learning_rate, config.learning_rate * config.final_rate
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_rate),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if config.warmup_steps == 0:
        return after
    # Starts at one step's worth, not at zero: a first step that changes nothing is a wasted step.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def decay_mask(params, decay_embeddings: bool):
    """The tree of the parameters, true where weight decay applies: matrices, and embeddings if asked; never norms or
    biases.
    """
    if isinstance(params, PackedTree):
        return dataclasses.replace(params, vectors={name: name == DECAYED for name in params.vectors})
    classes = {"matrix"} | ({"embedding"} if decay_embeddings else set())

    def decide(leaf):
        if not isinstance(leaf, nnx.Param):
            return False
        return leaf.replace(leaf.get_metadata()["decay"] in classes)

    return jax.tree.map(decide, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def find_rates(params, config: OptimConfig) -> dict[str, float]:
    """For each path the multiple of the learning rate that it is trained with; 0 is frozen.

    Raises:
      InputError: a pattern of `optim.groups` names no parameter.
    """
    rates, paths = config.rates, list(flatten(params))
    chosen = {path: first_match(path, rates) for path in paths}
    for pattern in rates:
        if pattern not in chosen.values():
            there = sorted({path.split("/")[0] for path in paths})
            raise InputError(f"config.optim.groups: {pattern!r} is no parameter's; there are {', '.join(there)}")
    return {path: 1.0 if pattern is None else rates[pattern] for path, pattern in chosen.items()}


def _scale_by_rates(config: OptimConfig) -> optax.GradientTransformation:
    def scale(updates, params=None):
        rates = config.rates

        def of_leaf(path, update):
            pattern = first_match(name_path(path), rates)
            return update if pattern is None else update * rates[pattern]

        return jax.tree_util.tree_map_with_path(of_leaf, updates)

    return optax.stateless(scale)


def label_groups(params, config: OptimConfig):
    """The tree of the parameters, with `trained` or `frozen` in place of each."""
    rates = find_rates(params, config)

    def label(path, _):
        return "trained" if rates[name_path(path)] else "frozen"

    # In the place of whole variables: what has no moments then has no empty variable in the state, either, which could
    # not be placed on a mesh.
    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind global-norm clipping.

    Frozen parameters (`optim.groups`) have no moments, and no part in the norm.
    """
    trained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: decay_mask(tree, config.decay_embeddings)),
        _scale_by_rates(config) if config.groups else optax.identity(),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
    if not config.groups:
        return trained
    groups = {"trained": trained, "frozen": optax.set_to_zero()}
    return optax.partition(groups, lambda params: label_groups(params, config))
