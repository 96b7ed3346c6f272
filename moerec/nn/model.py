"""The sequence model: slots in, one state a slot out, from which heads predict what comes next."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import ProfileContext, causal_segment_mask
from moerec.nn.block import LayerContext, run_blocks, split_layers, stack_blocks, zero_router_bias
from moerec.nn.embeddings import ItemEncoder, SlotEncoder
from moerec.nn.heads.item import ItemHead
from moerec.nn.layers import RMSNorm, dropout
from moerec.nn.moe.analyser import Analyser
from moerec.nn.moe.experts import DomainExperts
from moerec.nn.moe.router import RouterInputs
from moerec.nn.profile import ProfileRequest, ProfileState, UserState, count_profile_slots, make_personalizer
from moerec.nn.profile.profile_router import ProfileRouter, read_slot_profiles, swap_profiles
from moerec.types import NO_TIME, Batch, Catalog, Outputs, Routing


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What the data fixes about the model's shapes."""

    n_items: int
    n_tokens: int
    n_services: int
    n_actions: int
    context_sizes: tuple[int, ...]  # codes of each context feature, the first "missing"; the next one is "unseen"
    field_sizes: tuple[int, ...] = ()  # codes of each static profile field, the first of them "missing"
    has_control: bool = False  # whether sequences begin with the control slot `<|recommend|>`


class SequenceModel(nnx.Module):
    """A Qwen2-shaped decoder over slots.

    The plain layers from below are the trunk. Behind it stand the analyser, whose posterior the routers of all mixture
    layers above read, and the profile, which conditions the attention of the personal ones.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, sizes: ModelSizes):
        k_item, k_slot, k_blocks, k_head = jax.random.split(key, 4)
        items = (sizes.n_items, sizes.n_tokens)
        self.item_encoder = ItemEncoder(k_item, config, *items)
        # Static fields are read by the profile; where there is none, by the control slot.
        reads_fields = bool(count_profile_slots(config)) and config.personal.fields
        field_sizes = () if reads_fields else sizes.field_sizes
        services, shapes = (sizes.n_services, sizes.n_actions), (sizes.context_sizes, field_sizes)
        self.slot_encoder = SlotEncoder(k_slot, config, *services, *shapes, sizes.has_control)
        self.input_norm = RMSNorm(config.d_model, config.norm_eps)
        k_layers = jax.random.split(k_blocks, config.n_layers)
        self.groups = nnx.List(
            [
                stack_blocks(k_layers[group.first : group.last], config, sizes.n_services, group)
                for group in split_layers(config)
            ]
        )
        k_analyser, k_profile, k_router = (jax.random.fold_in(k_head, n) for n in range(1, 4))
        is_mixture, is_personal = bool(config.moe.layers), bool(config.personal.layers)
        self.analyser = Analyser(k_analyser, config.d_model, sizes.n_services, config.norm_eps) if is_mixture else None
        self.profile = make_personalizer(config, sizes.field_sizes).init(k_profile) if is_personal else None
        self.profile_router = ProfileRouter(k_router, config) if count_profile_slots(config) else None
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = ItemHead(k_head, config, *items, sizes.n_services)
        self.config, self.field_sizes, self.n_services = config, sizes.field_sizes, sizes.n_services

    def bind(self, catalog: Catalog) -> Catalog:
        """The catalogue with the vectors and biases of all its items, computed once."""
        item_I = jnp.arange(catalog.service_I.shape[0])
        vector_ID, bias_I = self.head.vectors(item_I, catalog._replace(vector_ID=None, bias_I=None), self.item_encoder)
        return catalog._replace(vector_ID=vector_ID, bias_I=bias_I)

    def event_vectors(self, item: jax.Array, action: jax.Array, catalog: Catalog) -> jax.Array:
        """What a profile is fed of events: vectors `[..., D]` of item, service and action."""
        return self._item_vectors(item, catalog) + self.slot_encoder.of_event(item, action, catalog)

    def _item_vectors(self, item: jax.Array, catalog: Catalog) -> jax.Array:
        """Of items as inputs: those of a bound catalogue, where inputs and candidates share their vectors."""
        if catalog.vector_ID is None or self.head.encoder is not None:
            return self.item_encoder(item, catalog)
        return catalog.vector_ID[item]

    def read_profiles(
        self,
        batch: Batch,
        catalog: Catalog,
        start_B: UserState | None = None,
        item_BTD: jax.Array | None = None,
    ) -> ProfileState:
        """Every slot's profile `[B, T, ...]`: the state before its event, as of its request.

        `start_B` are the states `[B, ...]` that the past has left in the users whose sequences are the rows' first;
        None: nothing is known of them yet. `item_BTD` are the items' vectors, where they are there already.
        """
        if item_BTD is None:
            item_BTD = self._item_vectors(batch.item_BT, catalog)
        event_BTD = item_BTD + self.slot_encoder.of_event(batch.item_BT, batch.action_BT, catalog)
        personalizer = make_personalizer(self.config, self.field_sizes)
        return read_slot_profiles(personalizer, self.profile, batch, event_BTD, self.config.personal.fields, start_B)

    def replace_profiles(self, profile: ProfileState, profile_source_BT: jax.Array, batch: Batch) -> ProfileState:
        """Other profiles than the slots' own, see `swap_profiles`."""
        personalizer = make_personalizer(self.config, self.field_sizes)
        no_fields = jnp.zeros(len(self.field_sizes) if self.config.personal.fields else 0, jnp.int32)
        request = ProfileRequest(jnp.asarray(NO_TIME), no_fields)
        nobody = personalizer.read(self.profile, personalizer.init_user(), request)
        return swap_profiles(profile, profile_source_BT, batch.segment_BT > 0, nobody)

    def encode(
        self,
        batch: Batch,
        catalog: Catalog,
        key: jax.Array | None = None,
        *,
        domain_BT: jax.Array | None = None,
        profile: ProfileState | None = None,
        router_bias_LE: jax.Array | None = None,
    ) -> Outputs:
        """States from which what comes next is predicted.

        Args:
          key: switches dropout and jitter on.
          domain_BT: int32 domain under which a slot's routing is counted, -1 for none; it decides nothing else.
          profile: of `read_profiles`, where it is not to be computed from the batch.
          router_bias_LE: of the training state; None for zeros.
        """
        config = self.config
        k_input, k_context, k_blocks = None, None, None
        if key is not None:
            k_input, k_blocks, k_context = jax.random.split(key, 3)
        item_BTD = self._item_vectors(batch.item_BT, catalog)
        event_BTD = self.input_norm(self.slot_encoder(batch, item_BTD, catalog, k_context))
        x_BTD = dropout(event_BTD, config.dropout, k_input).astype(jnp.dtype(config.compute_dtype))
        keys = None if k_blocks is None else jax.random.split(k_blocks, config.n_layers)
        bias_LE = zero_router_bias(config, self.n_services) if router_bias_LE is None else router_bias_LE
        context = LayerContext(batch.position_BT, batch.segment_BT)
        log_domain_BTZ, relevance_BTM, routings, n_mixtures, is_trunk = None, None, [], 0, True
        for blocks, group in zip(self.groups, split_layers(config), strict=True):
            n, bias = group.last - group.first, None
            if is_trunk and (group.experts or group.personal):
                x_BTD, context, log_domain_BTZ, relevance_BTM = self._condition(
                    x_BTD, item_BTD, batch, catalog, context, profile, domain_BT
                )
                is_trunk = False
            if group.experts:
                assert bias_LE is not None
                bias, n_mixtures = bias_LE[n_mixtures : n_mixtures + n], n_mixtures + n
            own = None if keys is None else keys[group.first : group.last]
            x_BTD, routing = run_blocks(blocks, x_BTD, context, bias, own, config.remat)
            routings += [routing] if group.experts else []
        routing = Routing(*map(jnp.concatenate, zip(*routings, strict=True))) if routings else None
        state_BTD, pointers = self.final_norm(x_BTD.astype(jnp.float32)), None
        if self.head.aggregator is not None:
            mask_BTS = causal_segment_mask(batch.segment_BT, config.window)
            aggregate: Any = jax.checkpoint(lambda a, *x: a(*x)) if config.remat else lambda a, *x: a(*x)
            pointers = aggregate(self.head.aggregator, state_BTD, event_BTD, batch, mask_BTS)
        return Outputs(state_BTD, log_domain_BTZ, routing, relevance_BTM, pointers)

    def _condition(
        self,
        x_BTD: jax.Array,
        item_BTD: jax.Array,
        batch: Batch,
        catalog: Catalog,
        context: LayerContext,
        profile: ProfileState | None,
        domain_BT: jax.Array | None,
    ) -> tuple[jax.Array, LayerContext, jax.Array | None, jax.Array | None]:
        """What stands between the trunk and the layers above it: the profile and its router, then the analyser."""
        relevance_BTM, log_domain_BTZ = None, None
        if self.config.personal.layers:
            if profile is None:
                profile = self.read_profiles(batch, catalog, item_BTD=item_BTD)
            slots = profile.slots(make_personalizer(self.config, self.field_sizes).basis(self.profile))
            log_relevance_BTM = jnp.zeros((*batch.item_BT.shape, 0))
            if self.profile_router is not None:
                relevance_BTM, log_relevance_BTM, read_BTD = self.profile_router(x_BTD, slots)
                x_BTD = x_BTD + read_BTD.astype(x_BTD.dtype)
            seen = (batch.time_BT, batch.service_BT, slots, log_relevance_BTM, profile.summary_D)
            context = context._replace(profile=ProfileContext(*seen))
        if self.analyser is not None:
            log_domain_BTZ = self.analyser(x_BTD)
            # The posterior stays one: the routers read it, but do not bend it to their ends.
            known = jax.lax.stop_gradient(log_domain_BTZ)
            domain_BT = jnp.full_like(batch.segment_BT, -1) if domain_BT is None else domain_BT
            context = context._replace(router=RouterInputs(known, domain_BT, batch.segment_BT > 0, relevance_BTM))
        return x_BTD, context, log_domain_BTZ, relevance_BTM


class Predictor(NamedTuple):
    """All that a trained model needs to answer: its parameters, and the biases of its routers, which are none.

    Attributes:
      params: the module. router_bias_LE: None in a dense model.
    """

    params: SequenceModel
    router_bias_LE: jax.Array | None

    def encode(self, batch: Batch, catalog: Catalog, **options: Any) -> Outputs:
        """`SequenceModel.encode` under the routers' biases."""
        return self.params.encode(batch, catalog, router_bias_LE=self.router_bias_LE, **options)

    @property
    def config(self) -> ModelConfig:
        return self.params.config


def count_active_params(model: SequenceModel) -> int:
    """Parameters that a slot's prediction depends on: all but those of the experts that it does not go to."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    moe = model.config.moe
    for blocks in model.groups:
        if isinstance(blocks.ffn, DomainExperts):
            matrices = (blocks.ffn.gate_EDF, blocks.ffn.up_EDF, blocks.ffn.down_EFD)
            n_experts = blocks.ffn.router_ED.shape[1]
            total -= sum(m.size // n_experts * (n_experts - moe.n_active) for m in matrices)
    return total
