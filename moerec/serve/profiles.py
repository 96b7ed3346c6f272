"""Profiles of users between runs of a program: taken further event by event, and kept in a store.

A profile in the store has seen the first `n_events` of its user's events. What came later stands in the row that the
model is given, and the profile is the state that this row begins with: so nothing is counted twice, and a user's
whole past counts at the cost of the last events.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moerec.config import Config
from moerec.config.terminal import printable
from moerec.data.dataset import UNKNOWN_TIME, Dataset, EventLog
from moerec.data.packing import device_time
from moerec.errors import InputError
from moerec.nn.model import SequenceModel
from moerec.nn.profile import Event, UserState, count_profile_slots, make_personalizer
from moerec.serve.profile_store import ProfileStore
from moerec.types import NO_TIME, Catalog

N_USERS, N_EVENTS = 1024, 64  # whose states, and how many of their events, one compiled call takes
N_NAMED = 3
MEND = "give all tables that it was fed from, or begin it anew with experiments.observe --forget=NAME"


class FeedResult(NamedTuple):
    """What `feed` did: users whose profile was taken further, the events that it took in, the users of whom no event is
    old enough for a profile; and those whose profile has seen other events than the data have, which is left as it is:
    how many, and the first few of them.
    """

    n_users: int
    n_events: int
    n_too_recent: int
    n_refused: int = 0
    refused: tuple[str, ...] = ()


def count_recent(config: Config) -> int:
    """The last events of a user that are to stay out of the store, for the row that the model is given.

    With a window those that a prediction reaches by attention, and one more, whose gap to the event before is not
    known; as many as a row holds without one, and where each event knows the last ones in all services. Predictions are
    then what they would be if the row held the whole past, but for what `explain_difference` says.
    """
    return min(_count_reached(config) or config.data.history_len, config.data.history_len)


def _count_reached(config: Config) -> int | None:
    """The last events that a prediction depends on otherwise than by the profile; None where these are all."""
    model = config.model
    return None if not model.window or model.time.service_gap else model.n_layers * (model.window - 1) + 2


def explain_difference(config: Config, n_given: int) -> str:
    """Why a prediction from a profile and the last `n_given` events is not that from the whole past in one row; empty
    where it is.
    """
    n_reached = _count_reached(config)
    if n_reached is not None:
        return "" if n_given >= n_reached else f"attention reaches the last {n_reached} events, not {n_given} alone"
    if config.model.window:
        return "model.time.service_gap knows the last event in each service, which may be in the profile alone"
    return "without model.window attention reaches all events, and those in a profile no longer"


def start_profile(model: SequenceModel) -> UserState:
    """The state of somebody of whom nothing is known, as numpy arrays.

    Raises:
      InputError: the model keeps no profile.
    """
    if not count_profile_slots(model.config):
        raise InputError("--workdir: this run keeps no profile; train it with model.personal.layers")
    return jax.tree.map(np.asarray, make_personalizer(model.config, model.field_sizes).init_user())


def open_profiles(folder: Path, model: SequenceModel, create: bool = False) -> ProfileStore:
    """The store of a model's profiles.

    Raises:
      InputError: there is none, and it is not to be made; or it holds the profiles of another model, or no profiles.
    """
    template, label = start_profile(model), _digest(model)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--profiles: {folder} is no folder")
    if not create and not folder.exists():
        raise InputError(f"--profiles: there is no {folder}; experiments.observe makes a store")
    if create and not (folder.exists() and any(folder.iterdir())):
        return ProfileStore.create(folder, template, label=label)
    store = ProfileStore.open(folder, template)
    if store.label != label:
        raise InputError(f"{folder}: holds the profiles of another run; those of each need a store of their own")
    return store


def _digest(model: SequenceModel) -> str:
    """Tells runs apart by the parameters that a state is written and read with."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(model.profile):
        sha.update(np.asarray(leaf).tobytes())
    return f"profile parameters {sha.hexdigest()}"


def read_profile(store: ProfileStore, model: SequenceModel, dataset: Dataset, user: str) -> tuple[UserState, bool]:
    """A user's profile, and whether the store has one; if not, it is that of somebody unknown.

    Raises:
      InputError: the profile has seen other events than the first of the user's in the data.
    """
    states, _, found = store.read([user], start_profile(model))
    at = np.flatnonzero(dataset.users == user)
    if len(at) and _has_seen_others(dataset, at, states)[0]:  # without a user `recommend` says so
        raise InputError(f"--profiles: the profile of {user!r} has seen other events than those in the data; {MEND}")
    return jax.tree.map(lambda leaf: leaf[0], states), bool(found[0])


def _has_seen_others(dataset: Dataset, users: np.ndarray, states: UserState) -> np.ndarray:
    """`[U]` bool, whose count of events and time are not those of a beginning of the user's history."""
    log = dataset.log
    seen = np.asarray(states.n_events, np.int64)
    known = np.where(log.time_us == UNKNOWN_TIME, -1, np.arange(log.n_events))
    latest = np.maximum.accumulate(known) if log.n_events else known  # the last row up to each whose time is known
    start = log.offsets[users]
    row = np.where(seen > 0, latest[np.clip(start + seen, 1, log.n_events) - 1], -1)
    time = np.where(row >= start, device_time(log.time_us[np.maximum(row, 0)]), NO_TIME)
    return (seen < 0) | (seen > log.offsets[users + 1] - start) | (time != states.time)


def feed(
    store: ProfileStore,
    model: SequenceModel,
    dataset: Dataset,
    catalog: Catalog,
    recent: int,
    before_us: int | None = None,
) -> FeedResult:
    """Takes everybody's profile in the store further, in batches that are on disk or not there at all.

    A call after an interruption, or after new events, goes on where the profiles are. A profile that has seen other
    events than those of its user in the data (one came late, or tables are not given again) is left as it is.

    Args:
      recent: the last events of each user that stay out. before_us: microseconds since 1970; events from then on stay
        out, too.

    Raises:
      VersionConflict: somebody else wrote to the store in the meantime; what is written stays.
    """
    log = dataset.log
    is_out = (
        np.zeros(log.n_events, bool)
        if before_us is None
        else (log.time_us >= before_us) & (log.time_us != UNKNOWN_TIME)
    )
    out = np.append(np.flatnonzero(is_out), log.n_events)
    end = np.minimum(out[np.searchsorted(out, log.offsets[:-1])], log.offsets[1:])
    wanted = np.maximum(end - log.offsets[:-1] - recent, 0)
    users = np.flatnonzero(wanted)
    users = users[np.argsort(-wanted[users], kind="stable")]  # batches of histories of about one length
    done = FeedResult(0, 0, log.n_users - len(users))
    for lo in range(0, len(users), N_USERS):
        chosen = users[lo : lo + N_USERS]
        names = [str(name) for name in dataset.users[chosen]]
        states, versions, _ = store.read(names, start_profile(model))
        is_wrong = _has_seen_others(dataset, chosen, states)
        if is_wrong.any():
            named = (*done.refused, *dataset.users[chosen[is_wrong]].tolist())[:N_NAMED]
            done = done._replace(n_refused=done.n_refused + int(is_wrong.sum()), refused=named)
        first = log.offsets[chosen] + states.n_events
        n_new = np.where(is_wrong, 0, np.maximum(log.offsets[chosen] + wanted[chosen] - first, 0))
        is_new = n_new > 0
        if not is_new.any():
            continue
        after = observe_events(model, catalog, log, states, first, n_new)
        moved = jax.tree.map(lambda leaf, is_new=is_new: leaf[is_new], after)
        store.update([name for name, new in zip(names, is_new, strict=True) if new], moved, versions[is_new])
        done = done._replace(n_users=done.n_users + int(is_new.sum()), n_events=done.n_events + int(n_new.sum()))
    return done


def describe_feed(done: FeedResult, recent: int, n_stored: int) -> list[str]:
    """What was done, in a line or two."""
    lines = [f"{done.n_events:,} events of {done.n_users:,} users taken in; {n_stored:,} users in the store"]
    if done.n_too_recent:
        lines.append(f"{done.n_too_recent:,} users have no events but the last {recent:,}, which stay out (--recent)")
    if done.n_refused:
        named = ", ".join(map(printable, done.refused))
        more = " and others" if done.n_refused > len(done.refused) else ""
        lines.append(f"{done.n_refused:,} profiles have seen other events than those in the data, and stay as they are")
        lines.append(f"  ({named}{more}): {MEND}")
    return lines


def observe_events(
    model: SequenceModel, catalog: Catalog, log: EventLog, states: UserState, first: np.ndarray, n_new: np.ndarray
) -> UserState:
    """States `[U, ...]` after each user's next events, one after the other, as a service would keep them.

    Args:
      states: `[U, ...]`, of users.
      first: `[U]`, the first new row of the log of each user.
      n_new: `[U]`, how many rows are new.
    """
    place = np.arange(-(-int(n_new.max(initial=0)) // N_EVENTS) * N_EVENTS)
    for lo in range(0, len(place), N_EVENTS):
        part = place[lo : lo + N_EVENTS]
        is_event = part[:, None] < n_new
        row = np.where(is_event, first + part[:, None], 0)
        events = (log.item[row], log.action[row], device_time(log.time_us[row]), is_event)
        states = _observe(model, states, tuple(map(jnp.asarray, events)), catalog)
    return jax.tree.map(np.asarray, states)


@jax.jit
def _observe(model: SequenceModel, states: UserState, events: tuple[jax.Array, ...], catalog: Catalog) -> UserState:
    """Args: `events` are item, action, time and whether there is one, each `[T, U]`."""
    personalizer = make_personalizer(model.config, model.field_sizes)
    observe = jax.vmap(personalizer.update, (None, 0, 0))

    def step(states, event):
        item_U, action_U, time_U, is_event_U = event
        event_U = Event(model.event_vectors(item_U, action_U, catalog), time_U, is_event_U)
        after = observe(model.profile, states, event_U)

        def choose(new, old):
            return jnp.where(is_event_U.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(choose, after, states), None

    return jax.lax.scan(step, states, events)[0]


def forget(store: ProfileStore, users: Sequence[str]) -> list[str]:
    """Removes users' profiles for good; returns the names of those who had none."""
    there = store.delete(users)
    return [name for name, found in zip(users, there, strict=True) if not found]
