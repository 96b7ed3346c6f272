"""The two programs of generation, each compiled once for a bucket of lengths: a prompt is read, and tokens follow."""

import contextlib
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moerec.config import ModelConfig
from moerec.nn.model import SequenceModel
from moerec.serve.generate.behind import Behind, read_behind
from moerec.serve.generate.cache import KVCache, merge_recent
from moerec.serve.generate.decoder import place_rows, run_prompt, run_slot, score_tokens, start_recent
from moerec.serve.generate.sampling import Draw, choose_tokens
from moerec.serve.generate.weights import TextWeights
from moerec.types import Array, Batch, Catalog

CHUNK = 32  # tokens a sequence that one call makes at most
NOTHING = -1  # where a sequence has ended


class Limits(NamedTuple):
    """Attributes: most_B: int32, tokens that a row gets at most; 0 of rows that are none. stop_X: int32, tokens at
    which text ends, filled up with -1.
    """

    most_B: Array
    stop_X: Array


class Whole(NamedTuple):
    """What events are read by. Attributes: model; router_bias_LE, or None; catalog, bound to it."""

    model: SequenceModel
    router_bias_LE: jax.Array | None
    catalog: Catalog


class Progress(NamedTuple):
    """Where the sequences of a batch are.

    Attributes:
      token_B: int32, the last token, not yet in the cache. place: int32 scalar, where it goes.
      n_padded_B: int32, places of padding before each sequence. n_B: int32, tokens made. done_B: bool.
    """

    token_B: jax.Array
    place: jax.Array
    n_padded_B: jax.Array
    n_B: jax.Array
    done_B: jax.Array


class Programs:
    """Compiled programs by their buckets.

    Attributes: n_compiled, and compile_s, seconds that they took.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None):
        self._mesh = mesh
        self._compiled: dict[Any, Any] = {}
        self._prefill = jax.jit(functools.partial(_prefill, config), static_argnames=("n_slots", "kind"))
        self._read = jax.jit(functools.partial(_read, config), static_argnames=("n_slots", "kind"))
        self._decode = jax.jit(functools.partial(_decode, config), static_argnames=("kind",), donate_argnums=(1,))
        self.compile_s = 0.0

    @property
    def n_compiled(self) -> int:
        return len(self._compiled)

    def prefill(
        self,
        weights: TextWeights,
        token_BT: Array,
        n_padded_B: Array,
        draw: Draw,
        limits: Limits,
        *,
        n_slots: int,
        kind: str,
    ) -> tuple[KVCache, None, Progress, jax.Array]:
        """The cache, nothing of events, the progress, and the first token of each row, `[B, 1]` int32 or `NOTHING`.

        Args: tokens padded on the left, and how far; slots of the cache; `Sampling.kind`.
        """
        key = "prefill", token_BT.shape, limits.stop_X.shape, n_slots, kind
        options = {"n_slots": n_slots, "kind": kind}
        return self._call(self._prefill, key, (weights, token_BT, n_padded_B, draw, limits), options)

    def read(
        self,
        weights: TextWeights,
        whole: Whole,
        batch: Batch,
        n_padded_B: Array,
        draw: Draw,
        limits: Limits,
        *,
        n_slots: int,
        kind: str,
    ) -> tuple[KVCache, Behind | None, Progress, jax.Array]:
        """As `prefill`, of events and words; and what text behind them is given."""
        key = "read", batch.kind_BT.shape, limits.stop_X.shape, n_slots, kind
        options = {"n_slots": n_slots, "kind": kind}
        return self._call(self._read, key, (weights, whole, batch, n_padded_B, draw, limits), options)

    def decode(
        self,
        weights: TextWeights,
        cache: KVCache,
        progress: Progress,
        draw: Draw,
        limits: Limits,
        n_steps: int,
        behind: Behind | None = None,
        *,
        kind: str,
    ) -> tuple[KVCache, Progress, jax.Array]:
        """The cache (the one given is used up), the progress, and up to `n_steps` further tokens of each row,
        `[B, CHUNK]` int32 or `NOTHING`. It ends early where all rows are done.
        """
        key = "decode", cache.k[0].shape, limits.stop_X.shape, kind, behind is not None
        arguments = weights, cache, progress, draw, limits, np.int32(n_steps), behind
        return self._call(self._decode, key, arguments, {"kind": kind})

    def _call(self, program: Any, key: Any, arguments: tuple, options: dict[str, Any]) -> Any:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if key not in self._compiled:
                started = time.monotonic()
                self._compiled[key] = program.lower(*arguments, **options).compile()
                self.compile_s += time.monotonic() - started
            return self._compiled[key](*arguments)


def _prefill(
    config: ModelConfig,
    weights: TextWeights,
    token_BT: jax.Array,
    n_padded_B: jax.Array,
    draw: Draw,
    limits: Limits,
    *,
    n_slots: int,
    kind: str,
) -> tuple[KVCache, None, Progress, jax.Array]:
    cache, x_BTD = run_prompt(weights, config, token_BT, n_padded_B, n_slots)
    return cache, None, *_begin(config, weights, x_BTD, n_padded_B, draw, limits, kind)


def _read(
    config: ModelConfig,
    weights: TextWeights,
    whole: Whole,
    batch: Batch,
    n_padded_B: jax.Array,
    draw: Draw,
    limits: Limits,
    *,
    n_slots: int,
    kind: str,
) -> tuple[KVCache, Behind | None, Progress, jax.Array]:
    cache, behind, x_BTD = read_behind(whole.model, whole.router_bias_LE, batch, whole.catalog, n_slots)
    return cache, behind, *_begin(config, weights, x_BTD, n_padded_B, draw, limits, kind)


def _begin(
    config: ModelConfig,
    weights: TextWeights,
    x_BTD: jax.Array,
    n_padded_B: jax.Array,
    draw: Draw,
    limits: Limits,
    kind: str,
) -> tuple[Progress, jax.Array]:
    """The first token of each sequence behind the states of its prompt."""
    n_rows, n_places, _ = x_BTD.shape
    logit_BV = score_tokens(weights, config, x_BTD[:, -1:])[:, 0]
    n_B = jnp.zeros(n_rows, jnp.int32)
    place = jnp.int32(n_places - 1)  # of the last one
    progress = Progress(n_B, place, n_padded_B, n_B, limits.most_B <= 0)
    progress, made_B = _advance(progress, choose_tokens(logit_BV, draw, n_B, kind), limits)
    return progress, made_B[:, None]


def _decode(
    config: ModelConfig,
    weights: TextWeights,
    cache: KVCache,
    progress: Progress,
    draw: Draw,
    limits: Limits,
    n_steps: jax.Array,
    behind: Behind | None,
    *,
    kind: str,
) -> tuple[KVCache, Progress, jax.Array]:
    start = progress.place

    def goes_on(carry: tuple) -> jax.Array:
        step, _, progress, _ = carry
        return (step < jnp.minimum(n_steps, CHUNK)) & ~jnp.all(progress.done_B)

    def add_token(carry: tuple) -> tuple:
        step, recent, progress, made_BX = carry
        slot = progress.token_B, start, progress.place, progress.n_padded_B
        recent, x_BTD = run_slot(weights, config, cache, recent, *slot, behind)
        logit_BV = score_tokens(weights, config, x_BTD)[:, 0]
        progress, made_B = _advance(progress, choose_tokens(logit_BV, draw, progress.n_B, kind), limits)
        made_BX = jax.lax.dynamic_update_slice_in_dim(made_BX, made_B[:, None], step, axis=1)
        return step + 1, recent, progress, made_BX

    made_BX = jnp.full((progress.token_B.shape[0], CHUNK), NOTHING, jnp.int32)
    carry = jnp.int32(0), start_recent(cache, CHUNK, behind), progress, made_BX
    _, recent, progress, made_BX = jax.lax.while_loop(goes_on, add_token, carry)
    cache = jax.tree.map(place_rows, merge_recent(cache, recent, start, progress.place))
    return cache, progress, _everywhere(made_BX)


def _advance(progress: Progress, token_B: jax.Array, limits: Limits) -> tuple[Progress, jax.Array]:
    """The progress after one more token a row, and the tokens that are new, else `NOTHING`: a stop token is none."""
    is_stop_B = jnp.any(token_B[:, None] == limits.stop_X, axis=1)
    is_new_B = ~progress.done_B & ~is_stop_B
    n_B = progress.n_B + is_new_B
    done_B = progress.done_B | is_stop_B | (n_B >= limits.most_B)
    found = progress._replace(token_B=token_B, place=progress.place + 1, n_B=n_B, done_B=done_B)
    return _everywhere((found, jnp.where(is_new_B, token_B, NOTHING)))


def _everywhere(tree: Any) -> Any:
    """On a mesh small things are on every device, before a step as after it: else there would be another program."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, PartitionSpec()), tree)
