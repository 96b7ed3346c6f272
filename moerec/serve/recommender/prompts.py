"""Prompts behind what users did: a user's events and then words, as `Generator.generate_behind` goes on with them."""

from collections.abc import Sequence

import numpy as np

from moerec.data.histories import make_histories
from moerec.data.packing import Placement, Sequences, Words, pack
from moerec.errors import InputError
from moerec.serve.recommender.packed_requests import find_users
from moerec.train.run_dir import Run
from moerec.types import PADDING, Batch


def lay_prompts(run: Run, users: Sequence[str], prompts: Sequence[np.ndarray], n_new: int) -> Batch:
    """A row each: the last events of a user, as many as fit, and the words behind them.

    Args:
      users: names of users in the data. prompts: int32 `[n]` token ids, of as many prompts.
      n_new: tokens that are to follow; the rows leave room for them.

    Raises:
      InputError: nobody is called so; a prompt is empty, or leaves no room for an event in `data.seq_len` slots.
    """
    data, dataset = run.config.data, run.data.dataset
    length = np.array([len(ids) for ids in prompts], np.int64)
    room = data.seq_len - length - n_new
    if not length.all() or (room < 1).any():
        worst = int(np.argmin(np.where(length > 0, room, -1)))
        why = "is empty" if not length[worst] else f"has {length[worst]} tokens, and {n_new} are to follow"
        raise InputError(f"prompt {worst + 1}: {why}; the run has rows of {data.seq_len} slots, events among them")
    at = find_users({name: u for u, name in enumerate(dataset.users.tolist())}, users)
    stop = dataset.log.offsets[at + 1]
    n_events = np.minimum(stop - dataset.log.offsets[at], np.minimum(room, data.history_len))
    # A sequence that has room for it begins with its control slot, as in training.
    has_control = data.first_event & (n_events < np.minimum(room, data.history_len))
    field_UY = dataset.profile_codes[0][at]
    sequences = Sequences(make_histories(stop - n_events, stop), np.zeros(len(at), np.int64), has_control, field_UY)
    words = Words(np.concatenate([[0], np.cumsum(length)]).astype(np.int64), np.concatenate(prompts).astype(np.int32))
    n_slots = sequences.n_slots + words.n_slots
    shape = len(at), int(n_slots.max())
    placed = Placement(len(at), np.arange(len(at)) * shape[1], np.ones(len(at), np.int32))
    batch = pack(dataset.log, dataset.catalogue, sequences, placed, shape, words).batch
    # The control slot behind the words asks for an item; here words follow.
    row, last = np.arange(len(at)), n_slots - 1
    batch.kind_BT[row, last], batch.segment_BT[row, last] = PADDING, 0
    return batch
