"""What each service answers with when it is asked: `p(item | state, service)` over its own catalogue.

A mixture of a softmax over the service's items with pointers into the user's events there: one with queries and keys of
the service's own, one that all services share, and those to the items near to the events' (`near_pointers`). Its
weights are a gate of the service's own (pointer networks: Vinyals et al. 2015; their mixture with a softmax: Merity et
al. 2017).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moerec.config import ModelConfig
from moerec.nn.attention import rotate
from moerec.nn.heads.near_pointers import (
    FIRST_SHARPNESS,
    FIRST_SLOPE,
    TEXT,
    NearTable,
    Pointed,
    Told,
    ask_nothing_at_first,
    near_names,
    point_near,
    read_table,
)
from moerec.nn.heads.places import Places
from moerec.nn.heads.pointer import favour_softmax, weigh_events
from moerec.nn.layers import MASK_VALUE, declare, fan_in, project
from moerec.nn.temporal import N_GAPS
from moerec.types import Array, Batch, Catalog, PointerMixture
from pallas_kernels.attention import find_bucket


class Pointees(NamedTuple):
    """Events as pointers see them; S slots of a row.

    Attributes:
      key_BSXH: float32, the rotated keys of each pointer.
      item_BS, service_BS, time_BS: int32; the service is Z where a slot is no event.
    """

    key_BSXH: Array
    item_BS: Array
    service_BS: Array
    time_BS: Array


class Asking(NamedTuple):
    """Slots that ask.

    Attributes:
      state_BTD: float32. service_BT: int32, whom they ask; -1 for nobody.
      position_BT: int32 places in the own sequence. time_BT: int32 times of the requests.
      mask_BTS: bool, which slots they see.
      places, told: where all these slots stand, and in training what `find_told` finds of each table; for pointers to
        neighbors.
    """

    state_BTD: Array
    service_BT: Array
    position_BT: Array
    time_BT: Array
    mask_BTS: Array
    places: Places | None = None
    told: Mapping[str, Told] = {}


def component_names(config: ModelConfig, services: Sequence[str] = ("own",)) -> tuple[str, ...]:
    """The components of an answer, in the order of their weights; a service that is asked has one pointer of its own.

    Args: the services' names, for a model in which none is asked.
    """
    if config.has_pointers and not config.is_asked:
        own = services if config.has_service_pointers else ()
        return ("softmax", *own, *(["shared"] if config.has_copies else []), *near_names(config))
    copies = (("own", config.has_service_pointers), ("shared", config.has_copies))
    return ("softmax", *(name for name, is_there in copies if is_there), *near_names(config))


class ServiceAnswers(nnx.Module):
    """Weights of the components, and what the pointers point at, for slots each of which asks one service.

    A pointer sees the events of the service asked alone, since the answer is an item of its catalogue; that of
    crossings sees those of all others. One without any event to point at has no weight.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, n_services: int):
        k_query, k_key, k_weight = jax.random.split(key, 3)
        self.components, self.n_services = component_names(config), n_services
        self.has_own, self.near = config.has_service_pointers, near_names(config)
        z, d, h = n_services, config.d_model, config.d_pointer
        n_shared = len(self.components) - 1 - self.has_own
        zeros = jax.nn.initializers.zeros
        # Of the services first, then those that they share.
        g = self.has_own * z + n_shared
        self.query_DGH = declare(k_query, (d, g, h), ("embed", None, None), ask_nothing_at_first(len(self.near)))
        self.key_DGH = declare(k_key, (d, g, h), ("embed", None, None), fan_in)
        n_components = len(self.components)
        self.weight_ZDX = declare(k_weight, (z, d, n_components), (None, "embed", None), zeros)
        self.gate_bias = declare(k_weight, (z, n_components), (None, None), favour_softmax, decay="none")
        has_time = config.pointer_time_bias
        self.time_gate_biasX = (
            declare(k_weight, (z, n_components - 1, N_GAPS + 1), (None, None, None), zeros, decay="none")
            if has_time
            else None
        )
        is_text, shape = TEXT in self.near, (z, len(self.near))
        self.sharpness_Z = (
            declare(key, (z,), (None,), nnx.initializers.constant(FIRST_SHARPNESS), decay="none") if is_text else None
        )
        self.slope_ZX = (
            declare(key, shape, (None, None), nnx.initializers.constant(FIRST_SLOPE), decay="none")
            if self.near
            else None
        )
        self.theta = config.rope_theta

    def _project(self, x_BTD: jax.Array, w_DGH: nnx.Param, service_BT: jax.Array, position_BT: jax.Array) -> jax.Array:
        """`[B, T, X, H]`, rotated queries or keys of each pointer; the own one's by the slot's service."""
        all_BTGH = project(x_BTD, w_DGH[...])
        if self.has_own:
            own_BTZ = jax.nn.one_hot(service_BT, self.n_services)
            own_BT1H = jnp.einsum("BTZH,BTZ->BTH", all_BTGH[:, :, : self.n_services], own_BTZ)[:, :, None]
            all_BTGH = jnp.concatenate([own_BT1H, all_BTGH[:, :, self.n_services :]], axis=2)
        return rotate(all_BTGH, position_BT, self.theta)

    def see_events(self, event_BSD: jax.Array, batch: Batch) -> Pointees:
        """Args: the events' vectors, of the slots of a batch."""
        key_BSXH = self._project(event_BSD, self.key_DGH, batch.service_BT, batch.position_BT)
        return Pointees(key_BSXH, batch.item_BT, batch.service_BT, batch.time_BT)

    def __call__(self, asking: Asking, events: Pointees, catalog: Catalog) -> PointerMixture:
        """The mixture at each slot that asks; what pointers give is of the events that it sees."""
        service_BT = asking.service_BT
        query_BTXH = self._project(asking.state_BTD, self.query_DGH, service_BT, asking.position_BT)
        logit_BXTS = jnp.einsum("BTXH,BSXH->BXTS", query_BTXH, events.key_BSXH) * query_BTXH.shape[-1] ** -0.5
        of_BTZ = jax.nn.one_hot(service_BT, self.n_services)
        if self.time_gate_biasX is not None:
            bucket_BTS = find_bucket(events.time_BS[:, None], asking.time_BT[:, :, None], N_GAPS + 1)
            table_BTXX = jnp.einsum("BTZ,ZXJ->BXTJ", of_BTZ, self.time_gate_biasX[...])
            logit_BXTS += jnp.take_along_axis(table_BTXX, bucket_BTS[:, None], axis=-1)
        open_BTS = asking.mask_BTS & (events.service_BS[:, None] == service_BT[..., None])
        n_copies, all_BS1 = logit_BXTS.shape[1] - len(self.near), jnp.ones((*events.service_BS.shape, 1))
        copies = [weigh_events(logit_BXTS[:, x], open_BTS, all_BS1) for x in range(n_copies)]
        tables = self._read_tables(events, catalog)
        pointed = self._point_near(tables, logit_BXTS[:, n_copies:], asking, events, of_BTZ)
        of_all_BTZX = project(asking.state_BTD, jnp.swapaxes(self.weight_ZDX[...], 0, 1))
        logit_BTX = jnp.sum(of_all_BTZX * of_BTZ[..., None], axis=-2)
        logit_BTX += of_BTZ @ self.gate_bias[...]
        evidence = [x.log_evidence_BT[..., None] for x in pointed]
        can = [jnp.zeros((*service_BT.shape, 1)), *(x.log_can_BTG for x in copies), *evidence]
        log_weight_BTX = jax.nn.log_softmax(jnp.maximum(logit_BTX + jnp.concatenate(can, axis=-1), MASK_VALUE))
        weight_BTX = jnp.exp(log_weight_BTX[..., 1:])
        parts = [x.share(weight_BTX[..., n, None]) for n, x in enumerate(copies)]
        parts += [weight_BTX[..., n_copies + n, None] * x.share_BTS for n, x in enumerate(pointed)]
        near = {name: x.near for name, x in zip(self.near, pointed, strict=True)}
        return PointerMixture(log_weight_BTX, jnp.stack(parts, axis=1), near)

    def _read_tables(self, events: Pointees, catalog: Catalog) -> list[NearTable]:
        sharpness_BS = None
        if self.sharpness_Z is not None:
            sharpness_BS = self.sharpness_Z[...][jnp.minimum(events.service_BS, self.n_services - 1)]
        return [read_table(name, events.item_BS, sharpness_BS, catalog, self.n_services) for name in self.near]

    def _point_near(
        self, tables: list[NearTable], logit_BXTS: jax.Array, asking: Asking, events: Pointees, of_BTZ: jax.Array
    ) -> list[Pointed]:
        if not self.near:
            return []
        assert asking.places is not None
        assert self.slope_ZX is not None
        slope_BTX = of_BTZ @ self.slope_ZX[...]
        mask_BTS = asking.mask_BTS & (events.service_BS < self.n_services)[:, None]
        services = events.service_BS, asking.service_BT
        return [
            point_near(
                name,
                logit_BXTS[:, n],
                slope_BTX[..., n],
                table,
                mask_BTS,
                asking.places,
                asking.told,
                *services,
            )
            for n, (name, table) in enumerate(zip(self.near, tables, strict=True))
        ]
