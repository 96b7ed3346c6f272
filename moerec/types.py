"""The letter legend, and the containers that pass between the parts.

Letters, one meaning each: A active experts of a slot, B sequences (packed rows), C context features, D model width, E
experts, F expert or feed-forward width, G groups of experts (Z and the cross group), H head width, I items, J negatives
and other candidates, K key/value heads, L layers, M memory slots of a profile, N query heads, O memory slots that are
written to, P width of a profile's memory, Q predictions asked for, R routed rows, S attended slots or the slots of a
whole step, T slots, U users, V text vocabulary, W text tokens of an item, X components of a mixture or axes of no other
name, Y static profile fields, Z services. Arrays carry them as a suffix: `x_BTD`. (`pallas_kernels`, usable alone,
has a legend of its own.)
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = Any  # np.ndarray where the loader makes it, jax.Array on the device

NO_TIME = np.int32(np.iinfo(np.int32).min)  # a time that is not known
TRANSITION_DECAY, TRANSITION_GAP = 0.8, 10  # of `Catalog.near["transitions"]`: a pair g places apart counts .8^(g - 1)
EPOCH_2000 = 946_684_800  # device times are int32 seconds since 2000-01-01, which lasts from 1931 to 2068

PADDING, EVENT, RECOMMEND, TOKEN = range(4)  # kinds of slots; `RECOMMEND` is the control token `<|recommend|>`


class Request(NamedTuple):
    """What is known of what comes next; carried by the slot at which the prediction is asked for.

    Attributes:
      time_BT: int32 seconds since 2000, UTC, or `NO_TIME`.
      utc_offset_BT: int32 seconds that clocks at the request's place are ahead of UTC.
      context_BTC: int32 codes, 0 missing.
      field_BTY: int32 codes of the user's static profile fields, 0 missing.
    """

    time_BT: Array
    utc_offset_BT: Array
    context_BTC: Array
    field_BTY: Array


class Target(NamedTuple):
    """What a task wants of each slot.

    Attributes:
      label_BT: int32, of the task's own vocabulary (0 where the weight is 0).
      weight_BT: float32 weight of the slot's loss; 0 for padding and for slots without a target.
    """

    label_BT: Array
    weight_BT: Array


class Batch(NamedTuple):
    """Packed slots. A slot is an event, a control token or a text token; `request` belongs to what comes after it.

    Attributes:
      kind_BT: int32, `PADDING`, `EVENT`, `RECOMMEND` or `TOKEN`.
      item_BT: int32 index into the catalogue; 0 where the slot is no event.
      service_BT: int32 service of the item; Z, the number of services, where the slot is no event.
      action_BT: int32.
      time_BT: int32 seconds since 2000, UTC, or `NO_TIME`; where the slot is no event that of the last event before it.
      utc_offset_BT: int32 seconds that clocks at the event's place are ahead of UTC.
      position_BT: int32 place within its own sequence, from 0.
      segment_BT: int32 from 1 in each row; 0 is padding.
      request: what is known of what comes next.
      targets: by the name of the task.
      token_BT: int32 index into the text vocabulary, 0 where the slot is no text; None where no slot is.
    """

    kind_BT: Array
    item_BT: Array
    service_BT: Array
    action_BT: Array
    time_BT: Array
    utc_offset_BT: Array
    position_BT: Array
    segment_BT: Array
    request: Request
    targets: dict[str, Target]
    token_BT: Array | None = None


class NearItems(NamedTuple):
    """Of each item, other ones that are near to it, by some table.

    Attributes:
      item_IX: int32, the nearest first; -1 where there are fewer. weight_IX: float32, falling, of the table's own kind.
    """

    item_IX: Array
    weight_IX: Array


class Catalog(NamedTuple):
    """What the model knows of the items.

    Attributes:
      service_I: int32 service of each item; it rises, a service's items stand together.
      token_IW: int32 text and attribute tokens, 0 is padding.
      count_I: float32 number of training events of each item.
      vector_ID, bias_I: of the items as candidates, once the catalogue is bound to parameters (`SequenceModel.bind`);
        repeat_I: what is added to the scores of items that the history has, or None.
      has_row_I: bool, in a training step, which items are not without their rows; None: all that were trained.
      near: for each pointer to neighbors its table. `text`: items of the same service whose texts are alike, by their
        cosines; `transitions`: those that stand near it in training histories of the service, by how often and how near
        (`TRANSITION_DECAY`); `crossings`: those of other services that stand near it in histories over all services.
      state_IX: float32 states of the items' texts by a language model, standardised; None without.
    """

    service_I: Array
    token_IW: Array
    count_I: Array
    vector_ID: Array | None = None
    bias_I: Array | None = None
    has_row_I: Array | None = None
    near: dict[str, NearItems] = {}  # noqa: RUF012, nobody writes to it
    repeat_I: Array | None = None
    state_IX: Array | None = None


# Of a stream of words alone.
NO_ITEMS = Catalog(np.zeros(0, np.int32), np.zeros((0, 1), np.int32), np.zeros(0, np.float32))


class Routing(NamedTuple):
    """Sums over the slots that have a domain, in each mixture layer: all that balance, bias and telemetry need.

    Sums of microbatches and devices add up to those of the global batch.

    Attributes:
      probability_LZE: float32, the router's probabilities by domain of the slot.
      count_LZE: float32, assignments; without gradient.
      square_lse_L: float32, squares of the log-sum-exp of the router's logits.
      dropped_L3: float32, assignments of all slots that found no place: for want of an expert's capacity, of room
        in the sender's buffer, and in the receiver's.
    """

    probability_LZE: Array
    count_LZE: Array
    square_lse_L: Array
    dropped_L3: Array


class NearPointer(NamedTuple):
    """How a pointer shares out among the neighbors of events what it gives to these.

    Attributes:
      share_BSX: float32 shares of the neighbors, in the order of the table of that name in `Catalog.near`; of
        crossings those of all services, of which those of the service asked get their share divided by `part_BTS`.
      part_BTS: float32, what the shares of the neighbors of the service asked add up to; None where that is one.
      own: in training, where the table knows the targets; of the items that follow the slots, and of no others.
    """

    share_BSX: Array
    part_BTS: Array | None = None
    own: "OwnShare | None" = None


class OwnShare(NamedTuple):
    """What the items that follow slots t have in the rows of events s. Attributes: `[B, T, S]` float32.

    next: their shares. own: what of these they owe to their own user's history, as a part of what the event has in the
      table. left: the part of the latter that is left without this user.
    """

    next: Array
    own: Array
    left: Array


class PointerMixture(NamedTuple):
    """The mixture `p(item) = w_0 softmax(item) + Σ_s (copy_s [item_s = item] + Σ_near given_s share_s(item))`.

    Attributes:
      log_weight_BTX: float32 logs of the components' weights, the softmax first, then the pointers.
      part_BXTS: float32, what each pointer gives to each event of the history, its weight included; those to neighbors
        are the last, in the order of their names.
      near: how the latter share it out, by the names of their tables.
      owner_BS: int32, where services have pointers of their own and none is asked, the service of each event: the first
        of the parts is then those of all services, each of which points at events of its own.
    """

    log_weight_BTX: Array
    part_BXTS: Array
    near: dict[str, NearPointer] = {}  # noqa: RUF012, nobody writes to it
    owner_BS: Array | None = None

    @property
    def n_copies(self) -> int:
        """How many parts are of pointers that give what they point at itself."""
        return self.part_BXTS.shape[1] - len(self.near)

    @property
    def n_owners(self) -> int:
        """How many pointers the first part is of, if of several."""
        return 0 if self.owner_BS is None else self.log_weight_BTX.shape[-1] - self.part_BXTS.shape[1]

    @property
    def copy_BTS(self) -> Array:
        """What the pointers to events themselves give to each."""
        return self.part_BXTS[:, : self.n_copies].sum(axis=1)

    def given_BTS(self, name: str) -> Array:
        """What the neighbors of each event in one table are given together."""
        return self.part_BXTS[:, self.n_copies + sorted(self.near).index(name)]


class Outputs(NamedTuple):
    """What the model makes of a batch. Nothing in it depends on a target, but through the hypotheses in training.

    Attributes:
      state_BTD: float32, from which the next item is predicted; where services are asked, under the slots' hypotheses.
      log_domain_BTZ: float32 log-posterior over the services of what comes next; None in a dense model.
      routing: of the mixture layers; None in a dense model.
      relevance_BTM: float32, how much each memory slot of the user's profile matters to the request; adds up to one.
        None in a model that is not personal.
      pointers: the mixture with the pointers; None where the softmax is the only component.
      had_BTS: bool, the events that each slot knows of, where the softmax has a bias for their items; or None.
    """

    state_BTD: Array
    log_domain_BTZ: Array | None
    routing: Routing | None
    relevance_BTM: Array | None = None
    pointers: PointerMixture | None = None
    had_BTS: Array | None = None


class Answers(NamedTuple):
    """What X services answer at Q slots: `p(item) = Σ_x p(x) p(item | x)`.

    Attributes:
      log_service_QX: float32 log-probabilities of the services asked; they add up to one over X.
      service_QX: int32, whose answers they are.
      state_QXD: float32 states, each under its hypothesis.
      pointers: mixtures `[Q, X, ...]` over the events of `item_QS`; None where the softmax is the only component.
      item_QS: int32 items of the row's slots.
      log_domain_QZ: the posterior over all services, before some are left out.
      relevance_QM: as `Outputs.relevance_BTM`.
      routing: of the mixture layers, sums over the slots under each hypothesis; None without experts.
      had_QS: as `Outputs.had_BTS`.
      group_QXG: float32, of each group of experts what the slot's experts of it weigh, mean over the mixture layers;
        None without experts, and where it was not asked for.
    """

    log_service_QX: Array
    service_QX: Array
    state_QXD: Array
    pointers: PointerMixture | None
    item_QS: Array
    log_domain_QZ: Array
    relevance_QM: Array | None
    routing: Routing | None
    had_QS: Array | None = None
    group_QXG: Array | None = None
