"""Vectors of items and of slots: sums of parts, each with its switch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moerec.config import ModelConfig
from moerec.nn.layers import RMSNorm, declare, fan_in, normal, sum_rows
from moerec.nn.sharding import ROW_AXES, find_layout
from moerec.nn.temporal import TimeEmbedding, last_times
from moerec.types import EVENT, NO_TIME, RECOMMEND, Batch, Catalog

STDDEV = 0.02


class TextEncoder(nnx.Module):
    """An item's text as the mean of its token embeddings, plus a one-layer gate over it, projected to the model width.

    Order is ignored: titles and attribute lists are short, and a bag needs no attention.
    """

    def __init__(self, key: jax.Array, n_tokens: int, d_text: int, d_model: int, eps: float):
        k_table, k_up, k_out = jax.random.split(key, 3)
        self.table_VD = declare(k_table, (n_tokens, d_text), ("vocab", None), normal(1.0), decay="embedding")
        self.norm = RMSNorm(d_text, eps)
        self.gate_DD = declare(k_up, (d_text, d_text), (None, None), fan_in)
        self.out_DD = declare(k_out, (d_text, d_model), (None, "embed"), normal(STDDEV * d_text**-0.5))

    def __call__(self, token_XW: jax.Array) -> jax.Array:
        """Args: token ids `[..., W]`, 0 is padding. Returns `[..., D]`; items without any token get a constant."""
        is_token_XW = token_XW > 0
        total = sum_rows(self.table_VD[...], token_XW, is_token_XW)
        n_X1 = jnp.sum(is_token_XW, axis=-1, keepdims=True).astype(jnp.float32)
        mean = self.norm(total / jnp.maximum(jnp.sqrt(n_X1), 1))
        return (mean + jax.nn.silu(mean @ self.gate_DD[...])) @ self.out_DD[...]


class StatesEncoder(nnx.Module):
    """An item's text as a language model sees it: its states, made narrow, with a one-layer gate, projected."""

    def __init__(self, key: jax.Array, d_states: int, d_text: int, d_model: int, eps: float):
        k_in, k_gate, k_out = jax.random.split(key, 3)
        self.in_XD = declare(k_in, (d_states, d_text), (None, None), fan_in)
        self.norm = RMSNorm(d_text, eps)
        self.gate_DD = declare(k_gate, (d_text, d_text), (None, None), fan_in)
        self.out_DD = declare(k_out, (d_text, d_model), (None, "embed"), normal(STDDEV * d_text**-0.5))

    def __call__(self, state_X: jax.Array) -> jax.Array:
        """Args: states `[..., X]`, zeros without a text. Returns `[..., D]`, then zeros, too."""
        narrow = self.norm(state_X @ self.in_XD[...])
        return (narrow + jax.nn.silu(narrow @ self.gate_DD[...])) @ self.out_DD[...]


class TokenEncoder(nnx.Module):
    """The vectors of text tokens: rows of a table, and nothing else."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        shape = config.text.vocab_size, config.d_model
        self.row_VD = declare(key, shape, ("vocab", "embed"), normal(STDDEV), decay="embedding")
        self.dtype = jnp.dtype(config.compute_dtype)

    def __call__(self, token_BT: jax.Array) -> jax.Array:
        """`[B, T, D]` float32, rounded to the model's type.

        On a mesh each device looks up what it has of the rows: left to the compiler, every device had the whole batch.
        """
        layout = find_layout(self.row_VD[...], self.row_VD.get_metadata()["axes"])
        if layout is None:
            return self.row_VD[...][token_BT].astype(self.dtype).astype(jnp.float32)
        table, n_batch = self.row_VD[...].astype(self.dtype), token_BT.shape[0]  # narrow before it travels

        def look_up(token_BT: jax.Array, table: jax.Array) -> jax.Array:
            table, first = layout.gather(table)
            place_BT = token_BT - first
            is_here_BT = (place_BT >= 0) & (place_BT < table.shape[0])
            rows = jnp.where(is_here_BT[..., None], table[jnp.clip(place_BT, 0, table.shape[0] - 1)], 0)
            return jax.lax.psum(rows, "model") if layout.is_split else rows

        by_row = PartitionSpec(ROW_AXES)
        specs = by_row, layout.spec
        padded_BT = jnp.pad(token_BT, ((0, -n_batch % layout.n_row_parts), (0, 0)))
        found = jax.shard_map(look_up, mesh=layout.mesh, in_specs=specs, out_specs=by_row)(padded_BT, table)
        return found[:n_batch].astype(jnp.float32)


def has_row(item_X: jax.Array, catalog: Catalog) -> jax.Array:
    """Bool, which items have a row and a bias of their own: those that were trained, less those dropped in a step."""
    has_row_I = catalog.count_I > 0 if catalog.has_row_I is None else catalog.has_row_I
    return has_row_I[item_X]


class ItemEncoder(nnx.Module):
    """An item's vector: its own row, plus its text, as a bag of words or by a language model's states. An item without
    a training event has its text alone, and a vector that all such items share.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_items: int, n_tokens: int, d_states: int = 0):
        k_row, k_text = jax.random.split(key)
        self.row_ID = (
            declare(k_row, (n_items, config.d_model), ("items", "embed"), normal(STDDEV), decay="embedding")
            if config.item_row
            else None
        )
        self.text = (
            TextEncoder(k_text, n_tokens, config.d_text, config.d_model, config.norm_eps) if config.item_text else None
        )
        widths = config.d_text, config.d_model, config.norm_eps
        k_states = jax.random.fold_in(k_text, 1)
        self.states = StatesEncoder(k_states, d_states, *widths) if config.item_states else None
        has_other = config.item_row and not config.untrained_rows
        zeros = jax.nn.initializers.zeros
        shape = (config.d_model,)
        self.no_row_D = declare(k_row, shape, ("embed",), zeros, decay="embedding") if has_other else None

    def __call__(self, item_X: jax.Array, catalog: Catalog) -> jax.Array:
        """Args: catalogue indices of any shape `[...]`. Returns `[..., D]` float32."""
        parts = []
        if self.row_ID is not None:
            row_XD = self.row_ID[...][item_X]
            if self.no_row_D is not None:
                row_XD = jnp.where(has_row(item_X, catalog)[..., None], row_XD, self.no_row_D[...])
            parts.append(row_XD)
        if self.text is not None:
            parts.append(self.text(catalog.token_IW[item_X]))
        if self.states is not None:
            assert catalog.state_IX is not None
            parts.append(self.states(catalog.state_IX[item_X]))
        return sum(parts[1:], parts[0])


class SlotEncoder(nnx.Module):
    """What a slot adds to its item's vector: service, action, its time, and the next request's time and context."""

    def __init__(
        self,
        key: jax.Array,
        config: ModelConfig,
        n_services: int,
        n_actions: int,
        context_sizes: tuple[int, ...],
        field_sizes: tuple[int, ...] = (),
        has_control: bool = False,
    ):
        keys = jax.random.split(key, 5)
        d = config.d_model

        def table(k, n, zero_rows=()):
            def init(key, shape, dtype):
                return normal(STDDEV)(key, shape, dtype).at[jnp.array(zero_rows, int)].set(0)

            return declare(k, (n, d), (None, "embed"), init, decay="embedding")

        self.service = table(keys[0], n_services) if config.service else None
        self.action = table(keys[1], n_actions) if config.action else None
        self.event_time = TimeEmbedding(keys[2], d, STDDEV, config.time) if config.event_time else None
        # Which service the request will go to is not known, so that it has the gaps of all.
        self.request_time = TimeEmbedding(keys[3], d, STDDEV, config.time, n_services) if config.request_time else None
        # One table for all features: feature c owns rows offset_c .. offset_c + size_c, the first of them "missing",
        # and one behind those of all features, "unseen". Perhaps no event trains these two: they start at zero.
        n_features, n_rows = len(context_sizes), sum(context_sizes) + len(context_sizes)
        missing = [sum(context_sizes[:c]) for c in range(n_features)]
        zero_rows = (*missing, *range(n_rows - n_features, n_rows))
        self.context = table(keys[4], n_rows, zero_rows) if config.request_context and n_features else None
        # The vector of the control token `<|recommend|>`, and what it adds of the user's static fields.
        k_control, k_field = (jax.random.fold_in(key, n) for n in (5, 6))
        init = normal(STDDEV)
        self.control_D = declare(k_control, (d,), ("embed",), init, decay="embedding") if has_control else None
        self.field = table(k_field, sum(field_sizes)) if has_control and field_sizes else None
        self.field_sizes = field_sizes
        self.n_gap_services = n_services if config.time.service_gap else 0
        self.context_sizes, self.context_dropout = context_sizes, config.context_dropout

    def of_event(self, item: jax.Array, action: jax.Array, catalog: Catalog) -> jax.Array:
        """What service and action add, `[..., D]`: all of an event that does not depend on what comes next."""
        parts = []
        if self.service is not None:
            parts.append(self.service[...][catalog.service_I[item]])
        if self.action is not None:
            parts.append(self.action[...][action])
        return sum(parts, jnp.zeros((), jnp.float32))

    def _control(self, field_BTY: jax.Array) -> jax.Array:
        """What a control slot is beside the request's time and context; a field that is missing adds nothing."""
        assert self.control_D is not None
        if self.field is None:
            return self.control_D[...]
        rows_BTY = jnp.cumsum(jnp.asarray(self.field_sizes)) - jnp.asarray(self.field_sizes) + field_BTY
        return self.control_D[...] + sum_rows(self.field[...], rows_BTY, field_BTY > 0)

    def _context_rows(self, code_BTC: jax.Array, key: jax.Array | None) -> jax.Array:
        """Rows of the context table; with a key some features are hidden, half of them as missing, half as unseen."""
        size_C = jnp.asarray(self.context_sizes, jnp.int32)
        if key is not None and self.context_dropout:
            u_BTC = jax.random.uniform(key, code_BTC.shape)
            hidden_BTC = jnp.where(u_BTC < self.context_dropout / 2, 0, size_C)
            code_BTC = jnp.where(u_BTC < self.context_dropout, hidden_BTC, code_BTC)
        unseen_C = jnp.sum(size_C) + jnp.arange(len(self.context_sizes))
        return jnp.where(code_BTC < size_C, jnp.cumsum(size_C) - size_C + code_BTC, unseen_C)

    def __call__(self, batch: Batch, item_BTD: jax.Array, catalog: Catalog, key: jax.Array | None = None) -> jax.Array:
        """`[B, T, D]`, what slots are: of an event its item, service, action and time, of a control slot its token;
        and of both what is known of the request.

        Args: vectors of the items; `key` switches the hiding of context features on.
        """
        request, is_event_BT1 = batch.request, (batch.kind_BT == EVENT)[..., None]
        parts = [item_BTD + self.of_event(batch.item_BT, batch.action_BT, catalog)]
        last_BTZ = None
        if self.n_gap_services:
            last_BTZ = last_times(batch.time_BT, batch.service_BT, batch.position_BT, self.n_gap_services)
        if self.event_time is not None:
            own_BT1 = None
            if last_BTZ is not None:
                before_BTZ = _previous(last_BTZ, batch.position_BT, NO_TIME)
                own_BT1 = jnp.take_along_axis(before_BTZ, batch.service_BT[..., None], axis=-1, mode="clip")
            since_BT = _previous(batch.time_BT, batch.position_BT, batch.time_BT)
            parts.append(self.event_time(batch.time_BT, batch.utc_offset_BT, since_BT, own_BT1))
        x_BTD = jnp.where(is_event_BT1, sum(parts[1:], parts[0]), 0)
        if self.control_D is not None:
            x_BTD += jnp.where((batch.kind_BT == RECOMMEND)[..., None], self._control(request.field_BTY), 0)
        if self.request_time is not None:
            x_BTD += self.request_time(request.time_BT, request.utc_offset_BT, batch.time_BT, last_BTZ)
        if self.context is not None:
            rows_BTC = self._context_rows(request.context_BTC, key)
            x_BTD += jnp.sum(self.context[...][rows_BTC], axis=-2)
        return x_BTD


def _previous(x_BTX: jax.Array, position_BT: jax.Array, first) -> jax.Array:
    """`x` of the slot before within the sequence; its first slot gets `first`."""
    shifted = jnp.concatenate([x_BTX[:, :1], x_BTX[:, :-1]], axis=1)
    is_first = (position_BT == 0).reshape(position_BT.shape + (1,) * (x_BTX.ndim - 2))
    return jnp.where(is_first, first, shifted)
