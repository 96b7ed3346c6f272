"""How often training events repeat an item that their user had, and what that says about masking seen items."""

import numpy as np

from moerec.config import Config
from moerec.data.load import RunData
from moerec.data.splits import TRAIN

# Masking makes a miss of each repeated target, so that no recall exceeds one less their share. A rule of thumb: better
# models often gain no more than a twentieth, and from there on masking may cost as much.
MOST_MASKED = 0.05


def measure_repeats(data: RunData) -> float:
    """The share of the training events whose item an earlier training event of the same user has; 0 without events."""
    rows, log = np.flatnonzero(data.split_ids == TRAIN), data.dataset.log
    pair = log.user[rows].astype(np.int64) * data.dataset.catalogue.n_items + log.item[rows]
    return 1 - len(np.unique(pair)) / len(rows) if len(rows) else 0.0  # all but the first event of each pair


def suggest_masking(config: Config, data: RunData) -> list[str]:
    """A line with the share of repeats, and which `eval.mask_seen` fits it.

    The built-in world has none: its repeats are known.
    """
    if config.data.source == "city":
        return []
    share, is_masked = measure_repeats(data), config.eval.mask_seen
    many = share > MOST_MASKED
    if many and not is_masked:
        wanted = "eval.mask_seen=false, as set, recommends such again"
    elif many:
        wanted = "set eval.mask_seen=false to recommend such again (masked, each is a miss)"
    elif is_masked:
        wanted = "eval.mask_seen=true, as set, recommends none again"
    else:
        wanted = "eval.mask_seen=true would leave their places to new items"
    return [f"{share:.1%} of training events repeat an item that the user had: {wanted}"]
