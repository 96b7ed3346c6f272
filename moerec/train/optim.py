"""The optimiser, from its config: clipping, AdamW with a decay mask, a schedule."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moerec.config import OptimConfig


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


def decay_mask(model, decay_embeddings: bool):
    """The model's tree, true where weight decay applies: matrices, and embeddings if asked; never norms or biases."""
    classes = {"matrix"} | ({"embedding"} if decay_embeddings else set())
    return jax.tree.map(
        lambda leaf: leaf.replace(leaf.get_metadata()["decay"] in classes) if isinstance(leaf, nnx.Param) else False,
        model,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind global-norm clipping."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: decay_mask(tree, config.decay_embeddings)),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )
