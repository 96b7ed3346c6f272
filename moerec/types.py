"""The letter legend, and the containers that pass between the parts.

B sequences (packed rows), T slots, S slots of a whole step or attended slots, D model width, N query heads, K key/value
heads, H head width, F feed-forward width, L layers, V text vocabulary, W text tokens of an item, I items, Z services,
C context features, Y static profile fields, M memory slots of a profile, Q predictions asked for, E experts, A experts
of a slot, G groups of experts (Z and the cross group), X answers that are mixed (the catalogue's, then the groups').
Arrays carry them as a suffix: `x_BTD`.
"""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = Any  # np.ndarray where the loader makes it, jax.Array on the device

NO_TIME = np.int32(np.iinfo(np.int32).min)  # a time that is not known
EPOCH_2000 = 946_684_800  # device times are int32 seconds since 2000-01-01, which lasts from 1931 to 2068


class Batch(NamedTuple):
    """Packed slots. A slot is an event; `request_*` and `target_*` belong to the event after it.

    Attributes:
      item_BT: int32 index into the catalogue.
      action_BT: int32.
      time_BT: int32 seconds since 2000, UTC, or `NO_TIME`.
      utc_offset_BT: int32 seconds that clocks at the event's place are ahead of UTC.
      position_BT: int32 place within its own sequence, from 0.
      segment_BT: int32 from 1 in each row; 0 is padding.
      request_time_BT: int32 seconds since 2000, UTC, or `NO_TIME`.
      request_utc_offset_BT: int32, as `utc_offset_BT`.
      request_context_BTC: int32 codes, 0 missing.
      field_BTY: int32 codes of the user's static profile fields, 0 missing.
      target_BT: int32 index of the next item (0 where the weight is 0).
      weight_BT: float32 weight of the slot's loss; 0 for padding and for slots without a target.
    """

    item_BT: Array
    action_BT: Array
    time_BT: Array
    utc_offset_BT: Array
    position_BT: Array
    segment_BT: Array
    request_time_BT: Array
    request_utc_offset_BT: Array
    request_context_BTC: Array
    field_BTY: Array
    target_BT: Array
    weight_BT: Array


class Catalog(NamedTuple):
    """What the model knows of the catalogue without learning it.

    Attributes:
      service_I: int32 service of each item.
      token_IW: int32 text and attribute tokens, 0 is padding.
      count_I: float32 number of training events of each item.
    """

    service_I: Array
    token_IW: Array
    count_I: Array


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


class PointerMixture(NamedTuple):
    """What is mixed into the distribution over items: `p(item) = w_0 softmax(item) + Σ_s copy_s [item_s = item]`.

    Attributes:
      log_weight_BTX: float32 logs of the answers' weights, the catalogue's softmax first, then the groups' pointers.
      copy_BTS: float32, what all pointers together give to each event of the history, their weights included.
    """

    log_weight_BTX: Array
    copy_BTS: Array


class Output(NamedTuple):
    """What the model makes of a batch.

    Attributes:
      state_BTD: float32, from which the next item is predicted.
      log_domain_BTZ: float32 log-posterior over the services of what comes next; None in a dense model.
      routing: of the mixture layers; None in a dense model.
      relevance_BTM: float32, how much each memory slot of the user's profile matters to the request; adds up to one.
        None in a model that is not personal.
      answers: what is mixed; None where the catalogue's softmax is the only answer.
    """

    state_BTD: Array
    log_domain_BTZ: Array | None
    routing: Routing | None
    relevance_BTM: Array | None = None
    answers: PointerMixture | None = None
