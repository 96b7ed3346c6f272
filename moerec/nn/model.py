"""The sequence model: slots in, one state a slot out, and item vectors to score it against."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import ProfileContext, segment_mask
from moerec.nn.block import run_blocks, split_layers, stack_blocks
from moerec.nn.embeddings import ItemEncoder, SlotEncoder
from moerec.nn.layers import RMSNorm, declare, dropout
from moerec.nn.moe.analyser import Analyser
from moerec.nn.moe.experts import DomainExperts, RouterInputs
from moerec.nn.pointer import Aggregator
from moerec.nn.profile import ProfileRequest, UserState
from moerec.nn.profile.profile_router import ProfileRouter, condition_slots, make_personalizer, swap_profiles
from moerec.types import NO_TIME, Batch, Catalog, Output, Routing


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the data fixes about the model's shapes."""

    n_items: int
    n_tokens: int
    n_services: int
    n_actions: int
    context_sizes: tuple[int, ...]  # codes of each context feature, the first "missing"; the next one is "unseen"
    field_sizes: tuple[int, ...] = ()  # codes of each static profile field, the first of them "missing"


class SequenceModel(nnx.Module):
    """A Qwen2-shaped decoder over event slots.

    The leading plain layers are the trunk. Behind it stand the analyser, whose posterior the routers of all mixture
    layers above read, and the profile, which conditions the attention of the personal ones.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, sizes: ModelSizes):
        k_item, k_slot, k_blocks, k_head = jax.random.split(key, 4)
        self.item_encoder = ItemEncoder(k_item, config, sizes.n_items, sizes.n_tokens)
        self.slot_encoder = SlotEncoder(k_slot, config, sizes.n_services, sizes.n_actions, sizes.context_sizes)
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        k_layers = jax.random.split(k_blocks, config.n_layers)
        trunk, *upper = split_layers(config)
        self.blocks = stack_blocks(k_layers[: trunk.last], config) if trunk.last else None
        k_analyser, k_profile, k_router, k_copy, k_untied = (jax.random.fold_in(k_head, n) for n in range(1, 6))
        is_mixture, is_personal = bool(config.moe.layers), bool(config.personal.layers)
        self.analyser = Analyser(k_analyser, config.d_model, sizes.n_services, config.norm_eps) if is_mixture else None
        self.profile = make_personalizer(config, sizes.field_sizes).init(k_profile) if is_personal else None
        self.profile_router = ProfileRouter(k_router, config) if config.personal.n_slots else None
        self.upper = nnx.List(
            [stack_blocks(k_layers[run.first : run.last], config, sizes.n_services, run) for run in upper]
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head_encoder = None if config.tie_items else ItemEncoder(k_untied, config, sizes.n_items, sizes.n_tokens)
        self.aggregator = Aggregator(k_copy, config, sizes.n_services) if config.pointer != "none" else None
        zeros = jax.nn.initializers.zeros
        self.item_bias_I = (
            declare(k_head, (sizes.n_items,), ("items",), zeros, decay="none") if config.item_bias else None
        )
        self.config, self.field_sizes = config, sizes.field_sizes

    def event_vectors(self, item: jax.Array, action: jax.Array, table: Catalog) -> jax.Array:
        """What a profile is fed of events: vectors `[..., D]` of item, service and action."""
        return self.item_encoder(item, table) + self.slot_encoder.of_event(item, action, table)

    def encode(
        self,
        batch: Batch,
        table: Catalog,
        key: jax.Array | None = None,
        vector_ID: jax.Array | None = None,
        profile_source_BT: jax.Array | None = None,
        start_B: UserState | None = None,
    ) -> Output:
        """States from which the next item is predicted; `key` switches dropout and jitter on.

        The targets (`batch.target_BT`, where the weight is not 0) decide only under which domain a slot is counted.
        `vector_ID` of `item_vectors`, where those of the whole catalogue are there already, saves encoding the items of
        the slots; it is used where inputs and answers share their items' vectors. `profile_source_BT` gives the slots other
        profiles than their own, see `swap_profiles`. `start_B` are the states `[B, ...]` that the past has left in the
        users whose sequences are the rows' first; None: they are nobody yet.
        """
        config = self.config
        k_input, k_context, k_blocks = None, None, None
        if key is not None:
            k_input, k_blocks, k_context = jax.random.split(key, 3)
        if vector_ID is None or self.head_encoder is not None:
            item_BTD = self.item_encoder(batch.item_BT, table)
        else:
            item_BTD = vector_ID[batch.item_BT]
        event_BTD = self.input_norm(item_BTD + self.slot_encoder(batch, table, k_context))
        x_BTD = dropout(event_BTD, config.dropout, k_input).astype(jnp.dtype(config.compute_dtype))
        keys = None if k_blocks is None else jax.random.split(k_blocks, config.n_layers)
        request, view, log_domain_BTZ, relevance_BTM, routings = None, None, None, None, []

        def advance(blocks, x_BTD, run):
            own = None if keys is None else keys[run.first : run.last]
            return run_blocks(blocks, x_BTD, batch.position_BT, batch.segment_BT, own, config.remat, request, view)

        trunk, *upper = split_layers(config)
        if self.blocks is not None:
            x_BTD, _ = advance(self.blocks, x_BTD, trunk)
        if config.personal.layers:
            read_BTD, relevance_BTM, view = self._read_profile(
                x_BTD, item_BTD, batch, table, profile_source_BT, start_B
            )
            x_BTD = x_BTD + read_BTD.astype(x_BTD.dtype)
        if self.analyser is not None:
            log_domain_BTZ = self.analyser(x_BTD)
            domain_BT = jnp.where(batch.weight_BT > 0, table.service_I[batch.target_BT], -1)
            # The posterior stays one: the routers read it, but do not bend it to their ends.
            known = jax.lax.stop_gradient(log_domain_BTZ)
            request = RouterInputs(known, domain_BT, batch.segment_BT > 0, relevance_BTM)
        for blocks, run in zip(self.upper, upper, strict=True):
            x_BTD, routing = advance(blocks, x_BTD, run)
            routings += [routing] if run.experts else []
        routing = Routing(*map(jnp.concatenate, zip(*routings, strict=True))) if routings else None
        state_BTD, answers = self.final_norm(x_BTD.astype(jnp.float32)), None
        if self.aggregator is not None:
            mask_BTS = segment_mask(batch.segment_BT, config.window)
            seen = (batch.position_BT, mask_BTS, table.service_I[batch.item_BT])
            aggregate = jax.checkpoint(lambda a, *x: a(*x)) if config.remat else lambda a, *x: a(*x)
            answers = aggregate(self.aggregator, state_BTD, event_BTD, *seen)
        return Output(state_BTD, log_domain_BTZ, routing, relevance_BTM, answers)

    def _read_profile(
        self,
        x_BTD: jax.Array,
        item_BTD: jax.Array,
        batch: Batch,
        table: Catalog,
        profile_source_BT: jax.Array | None,
        start_B: UserState | None,
    ) -> tuple[jax.Array, jax.Array | None, ProfileContext]:
        """What is added to the states, the relevance of the memory slots, and what the personal layers see."""
        personal = self.config.personal
        personalizer = make_personalizer(self.config, self.field_sizes)
        event_BTD = item_BTD + self.slot_encoder.of_event(batch.item_BT, batch.action_BT, table)
        condition = condition_slots(personalizer, self.profile, batch, event_BTD, personal.fields, start_B)
        if profile_source_BT is not None:
            no_fields = jnp.zeros(len(self.field_sizes) if personal.fields else 0, jnp.int32)
            nobody = ProfileRequest(jnp.asarray(NO_TIME), no_fields)
            nothing = personalizer.read(self.profile, personalizer.init_user(), nobody)
            condition = swap_profiles(condition, profile_source_BT, batch.segment_BT > 0, nothing)
        slots = condition.slots(personalizer.basis(self.profile))
        read_BTD, relevance_BTM, log_relevance_BTM = jnp.zeros(()), None, jnp.zeros((*batch.item_BT.shape, 0))
        if self.profile_router is not None:
            relevance_BTM, log_relevance_BTM, read_BTD = self.profile_router(x_BTD, slots)
        service_BT = table.service_I[batch.item_BT]
        return (
            read_BTD,
            relevance_BTM,
            ProfileContext(batch.time_BT, service_BT, slots, log_relevance_BTM, condition.summary_D),
        )

    def item_vectors(self, item_X: jax.Array, table: Catalog) -> tuple[jax.Array, jax.Array]:
        """Vectors `[..., D]` and biases `[...]` of candidates; a state's score is its dot product plus the bias."""
        encoder = self.item_encoder if self.head_encoder is None else self.head_encoder
        bias = jnp.zeros(item_X.shape, jnp.float32) if self.item_bias_I is None else self.item_bias_I[...][item_X]
        return encoder(item_X, table), bias

    def with_router_biases(self, move) -> "SequenceModel":
        """The model with other biases of its routers: `move(bias_LE, first)`, `first` counting mixture layers."""
        model = jax.tree.map(lambda leaf: leaf, self)
        done = 0
        for blocks in model.upper:
            if isinstance(blocks.ffn, DomainExperts):
                bias = blocks.ffn.bias_E
                bias[...] = move(bias[...], done)
                done += bias.shape[0]
        return model


def count_active_params(model: SequenceModel) -> int:
    """Parameters that a slot's answer depends on: all but those of the experts that it does not go to."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    moe = model.config.moe
    for blocks in model.upper:
        if isinstance(blocks.ffn, DomainExperts):
            matrices = (blocks.ffn.gate_EDF, blocks.ffn.up_EDF, blocks.ffn.down_EFD)
            n_experts = blocks.ffn.router_ED.shape[1]
            total -= sum(m.size // n_experts * (n_experts - moe.n_active) for m in matrices)
    return total
