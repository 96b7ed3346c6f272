"""The sequence model: slots in, one state a slot out, from which heads predict what comes next."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import ProfileContext, causal_segment_mask
from moerec.nn.block import (
    LayerContext,
    run_asked_blocks,
    run_blocks,
    split_layers,
    stack_blocks,
    zero_router_bias,
)
from moerec.nn.cache import AskedSlots, place_asked
from moerec.nn.embeddings import ItemEncoder, SlotEncoder, TokenEncoder
from moerec.nn.heads.item import ItemHead
from moerec.nn.heads.near_pointers import find_told
from moerec.nn.heads.places import find_places
from moerec.nn.heads.service_answers import Asking, ServiceAnswers
from moerec.nn.heads.text import TextHead
from moerec.nn.layers import RMSNorm, declare, dropout, normal
from moerec.nn.model.parts import Below, ModelSizes, refuse_parts
from moerec.nn.moe.analyser import Analyser
from moerec.nn.moe.hypotheses import Hypotheses, close_groups, followed_services, suppose_vector
from moerec.nn.moe.router import RouterInputs, close_to_text, count_groups
from moerec.nn.profile import ProfileRequest, ProfileState, UserState, count_profile_slots, make_personalizer
from moerec.nn.profile.profile_router import ProfileRouter, has_profile, read_slot_profiles, swap_profiles
from moerec.types import EVENT, NO_TIME, TOKEN, Answers, Batch, Catalog, Outputs, PointerMixture, Routing


class SequenceModel(nnx.Module):
    """A Qwen2-shaped decoder over slots.

    The plain layers from below are the trunk. Behind it stand the analyser, whose posterior the routers of all mixture
    layers above read, and the profile, which conditions the attention of the personal ones.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, sizes: ModelSizes):
        k_item, k_slot, k_blocks, k_head = jax.random.split(key, 4)
        items, has_events = (sizes.n_items, sizes.n_tokens), sizes.n_items > 0
        refuse_parts(config, has_events)
        self.item_encoder = ItemEncoder(k_item, config, *items, sizes.d_states) if has_events else None
        # Static fields are read by the profile; where there is none, by the control slot.
        reads_fields = bool(count_profile_slots(config)) and config.personal.fields
        field_sizes = () if reads_fields else sizes.field_sizes
        services, shapes = (sizes.n_services, sizes.n_actions), (sizes.context_sizes, field_sizes)
        self.slot_encoder = SlotEncoder(k_slot, config, *services, *shapes, sizes.has_control) if has_events else None
        self.input_norm = RMSNorm(config.d_model, config.norm_eps) if has_events else None
        k_token = jax.random.fold_in(k_slot, 7)
        self.token_encoder = TokenEncoder(k_token, config) if config.text.vocab_size else None
        k_layers = jax.random.split(k_blocks, config.n_layers)
        self.groups = nnx.List(
            [
                stack_blocks(k_layers[group.first : group.last], config, sizes.n_services, group)
                for group in split_layers(config)
            ]
        )
        k_analyser, k_profile, k_router, k_ask = (jax.random.fold_in(k_head, n) for n in (1, 2, 3, 6))
        is_mixture, is_personal = bool(config.moe.layers), bool(config.personal.layers)
        has_analyser = has_events and (is_mixture or config.is_asked)
        self.analyser = Analyser(k_analyser, config, sizes.n_services) if has_analyser else None
        shape, axes = (sizes.n_services, config.d_model), (None, "embed")
        # As large as what it is added to, or it goes unheard.
        self.hypothesis_ZD = declare(k_ask, shape, axes, normal(0.5), decay="embedding") if config.is_asked else None
        self.profile = make_personalizer(config, sizes.field_sizes).init(k_profile) if is_personal else None
        self.profile_router = ProfileRouter(k_router, config) if count_profile_slots(config) else None
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        scored = *items, sizes.n_services, sizes.d_states
        self.head = ItemHead(k_head, config, *scored) if has_events else None
        self.text_head = TextHead(jax.random.fold_in(k_token, 1), config) if config.text.vocab_size else None
        self.config, self.field_sizes, self.n_services = config, sizes.field_sizes, sizes.n_services
        self.service_offsets = sizes.service_offsets

    def bind(self, catalog: Catalog) -> Catalog:
        """The catalogue with the vectors and biases of all its items, computed once."""
        if self.head is None:
            return catalog
        assert self.item_encoder is not None
        return self.head.bind(catalog, self.item_encoder)

    def event_vectors(self, item: jax.Array, action: jax.Array, catalog: Catalog) -> jax.Array:
        """What a profile is fed of events: vectors `[..., D]` of item, service and action."""
        assert self.slot_encoder is not None
        return self._item_vectors(item, catalog) + self.slot_encoder.of_event(item, action, catalog)

    def _item_vectors(self, item: jax.Array, catalog: Catalog) -> jax.Array:
        """Of items as inputs: those of a bound catalogue, where inputs and candidates share their vectors."""
        assert self.item_encoder is not None
        if catalog.vector_ID is None or (self.head is not None and self.head.encoder is not None):
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
        assert self.slot_encoder is not None
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
        hypothesis_BT: jax.Array | None = None,
        known_next_BT: jax.Array | None = None,
        profile: ProfileState | None = None,
        router_bias_LE: jax.Array | None = None,
    ) -> Outputs:
        """States from which what comes next is predicted.

        Args:
          key: switches dropout and jitter on.
          domain_BT: int32 domain under which a slot's routing is counted, -1 for none; it decides nothing else.
          hypothesis_BT: where services are asked, int32 whom each slot asks, -1 for nobody; None: the past's slots ask
            the services that followed, and a sequence's last slot nobody (`ask` asks there).
          known_next_BT: int32 items that follow the slots, -1 for none, where the tables of transitions were counted
            on them, as in training: what they owe to them is taken out again.
          profile: of `read_profiles`, where it is not to be computed from the batch.
          router_bias_LE: of the training state; None for zeros.
        """
        config = self.config
        below = self._read(batch, catalog, key, domain_BT, profile)
        x_BTD, context = below.x_BTD, below.context
        if self.hypothesis_ZD is not None:
            hypothesis_BT = followed_services(batch, self.n_services) if hypothesis_BT is None else hypothesis_BT
            x_BTD, context = self._suppose(x_BTD, context, hypothesis_BT)
        bias_LE = zero_router_bias(config, self.n_services) if router_bias_LE is None else router_bias_LE
        routings = []
        for blocks, group, bias in self._upper_groups(bias_LE):
            own = None if below.keys is None else below.keys[group.first : group.last]
            x_BTD, routing = run_blocks(blocks, x_BTD, context, bias, own, config.remat)
            routings += [routing] if group.experts else []
        routing = Routing(*map(jnp.concatenate, zip(*routings, strict=True))) if routings else None
        state_BTD, pointers = self.final_norm(x_BTD.astype(jnp.float32)), None
        aggregator = None if self.head is None else self.head.aggregator
        if aggregator is not None:
            mask_BTS = causal_segment_mask(batch.segment_BT, config.window)
            places, told = find_places(batch, self.n_services) if aggregator.near else None, {}
            if known_next_BT is not None and places is not None:
                told = find_told(config, batch, catalog, known_next_BT, places, self.n_services)
            remember: Any = jax.checkpoint if config.remat else lambda f: f
            if isinstance(aggregator, ServiceAnswers):
                assert hypothesis_BT is not None
                where = batch.position_BT, batch.request.time_BT, mask_BTS, places, told
                asking = Asking(state_BTD, hypothesis_BT, *where)
                point = remember(lambda a, event, asking: a(asking, a.see_events(event, batch), catalog))
                pointers = point(aggregator, below.event_BTD, asking)
            else:
                point = remember(lambda a, state, event: a(state, event, batch, mask_BTS, catalog, places, told))
                pointers = point(aggregator, state_BTD, below.event_BTD)
        had_BTS = None
        if config.repeat_bias:
            had_BTS = causal_segment_mask(batch.segment_BT, config.window) & (batch.kind_BT == EVENT)[:, None]
        return Outputs(state_BTD, below.log_domain_BTZ, routing, below.relevance_BTM, pointers, had_BTS)

    def ask(
        self,
        batch: Batch,
        catalog: Catalog,
        flat_Q: jax.Array,
        hypotheses: Hypotheses,
        *,
        profile: ProfileState | None = None,
        router_bias_LE: jax.Array | None = None,
        closed_G: jax.Array | None = None,
        below: Below | None = None,
        weigh_groups: bool = False,
    ) -> Answers:
        """What services answer at slots; the past is computed once, and at each hypothesis the asked slot alone.

        Args:
          flat_Q: int32 flat slots, each a sequence's last one.
          hypotheses: whom they ask.
          profile: as in `encode`.
          router_bias_LE: as in `encode`.
          closed_G: float32, added to what is closed: `MASK_VALUE` for groups that are taken away (a probe's).
          below: of `read`, where it is there already. weigh_groups: whether `Answers.group_QXG` is wanted.
        """
        config = self.config
        assert self.hypothesis_ZD is not None
        assert self.analyser is not None
        below = self._read(batch, catalog, None, None, profile) if below is None else below
        x_BTD, context = self._suppose(below.x_BTD, below.context, followed_services(batch, self.n_services))
        if closed_G is not None and context.router is not None:
            assert context.router.closed_BTG is not None
            closed_BTG = jnp.minimum(context.router.closed_BTG, closed_G)
            context = context._replace(router=context.router._replace(closed_BTG=closed_BTG))
        asked = place_asked(batch, flat_Q, config.window, context.profile)

        vector_QXD = suppose_vector(hypotheses.vector_QX, self.hypothesis_ZD[...])
        x_QXD = _pick_slots(below.x_BTD, flat_Q)[:, None] + vector_QXD.astype(x_BTD.dtype)
        if context.router is not None:
            asked = asked._replace(router=self._open(context.router, flat_Q, hypotheses, closed_G))
        bias_LE = zero_router_bias(config, self.n_services) if router_bias_LE is None else router_bias_LE
        routings, weights = [], []
        for blocks, _, bias in self._upper_groups(bias_LE):
            of_layers = blocks, x_BTD, x_QXD, context, asked, bias, weigh_groups
            x_BTD, x_QXD, routing, group_LQXG = run_asked_blocks(*of_layers)
            routings += [] if routing is None else [routing]
            weights += [] if group_LQXG is None else [group_LQXG]
        routing = Routing(*map(jnp.concatenate, zip(*routings, strict=True))) if routings else None
        state_QXD, pointers = self.final_norm(x_QXD.astype(jnp.float32)), None
        if self.head is not None and isinstance(self.head.aggregator, ServiceAnswers):
            pointers = self._point_asked(batch, catalog, asked, hypotheses.answer_QX, state_QXD, below.event_BTD)
        relevance_QM = None if below.relevance_BTM is None else _pick_slots(below.relevance_BTM, flat_Q)
        assert below.log_domain_BTZ is not None
        log_domain_QZ = _pick_slots(below.log_domain_BTZ, flat_Q)
        had_QS = asked.seen_QS & (batch.kind_BT == EVENT)[asked.row_Q] if config.repeat_bias else None
        asked_of = hypotheses.log_weight_QX, hypotheses.answer_QX, state_QXD, pointers, batch.item_BT[asked.row_Q]
        group_QXG = jnp.mean(jnp.concatenate(weights), axis=0) if weights else None
        return Answers(*asked_of, log_domain_QZ, relevance_QM, routing, had_QS, group_QXG)

    def read(self, batch: Batch, catalog: Catalog, profile: ProfileState | None = None) -> Below:
        """The trunk, the profile and the analyser's posterior, without dropout: all that no hypothesis changes."""
        return self._read(batch, catalog, None, None, profile)

    def _read(
        self,
        batch: Batch,
        catalog: Catalog,
        key: jax.Array | None,
        domain_BT: jax.Array | None,
        profile: ProfileState | None,
    ) -> Below:
        config = self.config
        k_input, k_context, k_blocks = None, None, None
        if key is not None:
            k_input, k_blocks, k_context = jax.random.split(key, 3)
        item_BTD, event_BTD = self._embed(batch, catalog, k_context)
        x_BTD = dropout(event_BTD, config.dropout, k_input).astype(jnp.dtype(config.compute_dtype))
        keys = None if k_blocks is None else jax.random.split(k_blocks, config.n_layers)
        k_analyser = None if k_blocks is None else jax.random.fold_in(k_blocks, config.n_layers)
        context = LayerContext(batch.position_BT, batch.segment_BT)
        groups = split_layers(config)
        for blocks, group in zip(self.groups, groups, strict=True):
            if group.last > self.config.n_trunk:
                break
            own = None if keys is None else keys[group.first : group.last]
            x_BTD, _ = run_blocks(blocks, x_BTD, context, None, own, config.remat)
        of_trunk = x_BTD, item_BTD, batch, catalog, context, profile, domain_BT, k_analyser
        x_BTD, context, log_domain_BTZ, relevance_BTM = self._condition(*of_trunk)
        return Below(x_BTD, event_BTD, context, log_domain_BTZ, relevance_BTM, keys)

    def _embed(self, batch: Batch, catalog: Catalog, key: jax.Array | None) -> tuple[jax.Array | None, jax.Array]:
        """The vectors of the slots' items, and of the slots: a token's is its row, with nothing added."""
        token_BTD = None
        if self.token_encoder is not None and batch.token_BT is not None:
            token_BTD = self.token_encoder(batch.token_BT)
        if self.slot_encoder is None or self.input_norm is None:
            assert token_BTD is not None
            return None, token_BTD
        item_BTD = self._item_vectors(batch.item_BT, catalog)
        event_BTD = self.input_norm(self.slot_encoder(batch, item_BTD, catalog, key))
        if token_BTD is not None:
            event_BTD = jnp.where((batch.kind_BT == TOKEN)[..., None], token_BTD, event_BTD)
        return item_BTD, event_BTD

    def _upper_groups(self, bias_LE: jax.Array | None):
        """The groups of layers above the trunk, each with its routers' biases."""
        n_mixtures = 0
        for blocks, group in zip(self.groups, split_layers(self.config), strict=True):
            if group.first < self.config.n_trunk:
                continue
            bias, n = None, group.last - group.first
            if group.experts:
                assert bias_LE is not None
                bias, n_mixtures = bias_LE[n_mixtures : n_mixtures + n], n_mixtures + n
            yield blocks, group, bias

    def _suppose(
        self, x_BTD: jax.Array, context: LayerContext, hypothesis_BT: jax.Array
    ) -> tuple[jax.Array, LayerContext]:
        """States and context under the hypotheses of the slots."""
        assert self.hypothesis_ZD is not None
        x_BTD = x_BTD + suppose_vector(hypothesis_BT, self.hypothesis_ZD[...]).astype(x_BTD.dtype)
        if context.router is not None:
            n_groups = count_groups(self.config.moe, self.n_services)
            closed_BTG = close_groups(hypothesis_BT, self.n_services, n_groups)
            context = context._replace(router=context.router._replace(closed_BTG=closed_BTG))
        return x_BTD, context

    def _open(
        self, known: RouterInputs, flat_Q: jax.Array, hypotheses: Hypotheses, closed_G: jax.Array | None
    ) -> RouterInputs:
        """What the routers know of the asked slots, `[Q, X]`; routing is counted under the service that answers."""
        group_QX = hypotheses.group_QX

        def pick(x_BTX):
            x_QX = x_BTX.reshape(-1, *x_BTX.shape[2:])[flat_Q][:, None]
            return jnp.broadcast_to(x_QX, (*group_QX.shape, *x_QX.shape[2:]))

        closed_QXG = close_groups(group_QX, self.n_services, count_groups(self.config.moe, self.n_services))
        if closed_G is not None:
            closed_QXG = jnp.minimum(closed_QXG, closed_G)
        relevance_QXM = None if known.relevance_BTM is None else pick(known.relevance_BTM)
        log_domain_QXZ, real_QX = pick(known.log_domain_BTZ), pick(known.real_BT)
        return RouterInputs(log_domain_QXZ, hypotheses.answer_QX, real_QX, relevance_QXM, closed_QXG)

    def _point_asked(
        self,
        batch: Batch,
        catalog: Catalog,
        asked: AskedSlots,
        service_QX: jax.Array,
        state_QXD: jax.Array,
        event_BTD: jax.Array,
    ) -> PointerMixture:
        aggregator = None if self.head is None else self.head.aggregator
        assert isinstance(aggregator, ServiceAnswers)
        events = jax.tree.map(lambda x: x[asked.row_Q], aggregator.see_events(event_BTD, batch))
        time_Q1 = batch.request.time_BT.reshape(-1)[asked.flat_Q][:, None]
        position_QX, time_QX = (jnp.broadcast_to(x, service_QX.shape) for x in (asked.position_Q1, time_Q1))
        mask_QXS = jnp.broadcast_to(asked.seen_QS[:, None], (*service_QX.shape, asked.seen_QS.shape[1]))
        places = None
        if aggregator.near:
            places = find_places(batch, self.n_services).of_asked(asked.row_Q, asked.flat_Q, position_QX)
        return aggregator(Asking(state_QXD, service_QX, position_QX, time_QX, mask_QXS, places), events, catalog)

    def _condition(
        self,
        x_BTD: jax.Array,
        item_BTD: jax.Array | None,
        batch: Batch,
        catalog: Catalog,
        context: LayerContext,
        profile: ProfileState | None,
        domain_BT: jax.Array | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LayerContext, jax.Array | None, jax.Array | None]:
        """What stands between the trunk and the layers above it: the profile and its router, then the analyser."""
        relevance_BTM, log_domain_BTZ = None, None
        if self.config.personal.layers:
            if profile is None:
                profile = self.read_profiles(batch, catalog, item_BTD=item_BTD)
            slots = profile.slots(make_personalizer(self.config, self.field_sizes).basis(self.profile))
            log_relevance_BTM = jnp.zeros((*batch.item_BT.shape, 0))
            known_BT = None if batch.token_BT is None else has_profile(batch)
            if self.profile_router is not None:
                relevance_BTM, log_relevance_BTM, read_BTD = self.profile_router(x_BTD, slots)
                if known_BT is not None:
                    read_BTD = jnp.where(known_BT[..., None], read_BTD, 0)
                x_BTD = x_BTD + read_BTD.astype(x_BTD.dtype)
            seen = (batch.time_BT, batch.service_BT, slots, log_relevance_BTM, profile.summary_D, known_BT)
            context = context._replace(profile=ProfileContext(*seen))
        if self.analyser is not None:
            log_domain_BTZ = self.analyser(x_BTD, context, key)
        if self.config.moe.layers:
            # The posterior stays one: the routers read it, but do not bend it to their ends.
            known = None if log_domain_BTZ is None else jax.lax.stop_gradient(log_domain_BTZ)
            domain_BT = jnp.full_like(batch.segment_BT, -1) if domain_BT is None else domain_BT
            router = RouterInputs(known, domain_BT, batch.segment_BT > 0, relevance_BTM)
            context = context._replace(router=close_to_text(router, batch, self.n_services, self.config.moe))
        return x_BTD, context, log_domain_BTZ, relevance_BTM


def _pick_slots(x_BTX: jax.Array, flat_Q: jax.Array) -> jax.Array:
    return x_BTX.reshape(-1, x_BTX.shape[-1])[flat_Q]
