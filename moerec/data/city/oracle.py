"""The exact Bayes posterior predictive of the city world: the ceiling of every model of its items.

A forward filter over (need of the last event, type in each kind of service): the shared type is summed out beforehand,
since the types by kind are independent given it, so the belief of a user is one table `[N, K, K, K]` (K types, one
axis a kind). An event multiplies the belief by its likelihood, which sees the need and one kind's type only.
Method: the forward recursion of hidden Markov models (Rabiner 1989), with the static types as part of the state.
"""

from collections.abc import Iterator

import numpy as np

from moerec.data.city import timeline
from moerec.data.city.choice import ItemChoice, Past, need_logits, recency, service_probabilities, softmax
from moerec.data.city.profile import profile_likelihood
from moerec.data.city.services import N_KINDS
from moerec.data.city.world import World
from moerec.data.dataset import Dataset, floor_seconds
from moerec.errors import InputError

# Smaller posterior probabilities are dropped: denormal numbers make the products thirty times slower.
_NEGLIGIBLE = np.float32(1e-25)


def posterior_predictive(
    world: World,
    dataset: Dataset,
    targets: np.ndarray | None = None,
    use_profile: bool = False,
    use_context: bool = True,
) -> np.ndarray:
    """`[targets, I]` float32 log-probabilities of `predict_targets` at once; all events where `targets` is None."""
    targets = np.arange(dataset.log.n_events) if targets is None else np.asarray(targets)
    scores = np.empty((len(targets), dataset.catalogue.n_items), np.float32)
    for positions, chunk in predict_targets(world, dataset, targets, use_profile, use_context):
        scores[positions] = chunk
    return scores


def predict_targets(
    world: World,
    dataset: Dataset,
    targets: np.ndarray,
    use_profile: bool = False,
    use_context: bool = True,
    users_per_chunk: int = 128,
    rows_per_chunk: int = 512,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (positions in `targets`, their log-probabilities `[chunk, I]` float32 over the union), each target once.

    The probability of a target's item is given every earlier event of its user in `dataset.log` (items, times,
    contexts) and the target's own time and context; with `use_profile` also given the user's profile fields; without
    `use_context` in the mean over the contexts of the days of the target's month, instead of its own (but for what is
    open). The data set may number the items of a service as it likes: they are matched with the world's by id. Memory:
    about `users_per_chunk` beliefs of `N * K**3` floats and two chunks of rows.

    Raises: InputError where the data set is not of this world or a target is not an event of its log.
    """
    targets = np.asarray(targets, dtype=np.int64)
    log = dataset.log
    if len(targets) and (targets.min() < 0 or targets.max() >= log.n_events):
        raise InputError(f"oracle: targets must lie in [0, {log.n_events})")
    problem = _Filter(world, dataset)
    order = np.argsort(targets, kind="stable")
    users = log.users_of(targets[order])
    asked, first, count = np.unique(users, return_index=True, return_counts=True)
    steps = targets[order[first + count - 1]] - log.offsets[asked]  # the last one asked for
    longest = np.argsort(-steps, kind="stable")
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for lo in range(0, len(asked), users_per_chunk):
        chosen = longest[lo : lo + users_per_chunk]
        for event, scores in problem.run(asked[chosen], steps[chosen], targets[order], use_profile, use_context):
            # an event may be asked for more than once
            left, right = (np.searchsorted(targets[order], event, side=side) for side in ("left", "right"))
            repeat = np.repeat(np.arange(len(event)), right - left)
            within = np.arange(len(repeat)) - np.repeat(np.cumsum(right - left) - (right - left), right - left)
            rows.append((order[left[repeat] + within], scores[repeat]))
            if sum(len(positions) for positions, _ in rows) >= rows_per_chunk:
                yield _join(rows)
                rows = []
    if rows:
        yield _join(rows)


def _join(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([positions for positions, _ in rows]), np.concatenate([scores for _, scores in rows])


def match_items(world: World, dataset: Dataset) -> np.ndarray:
    """`[I]` the world's index of each of the data set's items."""
    ours, theirs = world.catalogue, dataset.catalogue
    if ours.services != theirs.services or not np.array_equal(ours.offsets, theirs.offsets):
        raise InputError("oracle: the data set's catalogue is not of this world")
    parts = []
    for lo, hi in zip(ours.offsets[:-1], ours.offsets[1:], strict=True):
        order = np.argsort(ours.ids[lo:hi])
        place = np.searchsorted(ours.ids[lo:hi], theirs.ids[lo:hi], sorter=order)
        found = order[np.minimum(place, hi - lo - 1)]
        if not np.array_equal(ours.ids[lo:hi][found], theirs.ids[lo:hi]):
            raise InputError("oracle: the data set's catalogue has items that are not of this world")
        parts.append(lo + found)
    return np.concatenate(parts)


class _Filter:
    """What the filter needs of a world and a data set, computed once."""

    def __init__(self, world: World, dataset: Dataset):
        log = dataset.log
        self.time = floor_seconds(log.time_us)
        self.world, self.dataset, self.choice = world, dataset, ItemChoice(world)
        self.world_item_I = match_items(world, dataset)
        self.item = self.world_item_I[log.item]
        self.service = dataset.event_service
        self.position = self.item - world.catalogue.offsets[self.service]
        self.need_logits = need_logits(world, self.time, log.context)
        self.open_EZ = timeline.read_openings(dataset.context, log.context, len(self.choice.ranges))
        self.recency = recency(world, self.time, log.offsets)
        self.need_after = world.need_after_NN.astype(np.float32)
        self.service_DNZ = service_probabilities(world)
        self.daypart = timeline.clock_of(self.time)[0]
        # [N, K, items] as [N * K, items], for matrix products
        self.base = [base.reshape(-1, base.shape[-1]) for base in self.choice.base]

    def run(
        self, users: np.ndarray, steps: np.ndarray, targets: np.ndarray, use_profile: bool, use_context: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Filters `users` (sorted by falling `steps`, the last one wanted); yields (events, scores `[events, I]`)."""
        offsets = self.dataset.log.offsets[:-1][users]
        n_needs, n_types = len(self.need_after), self.world.n_types
        belief = self._prior(users, use_profile)
        past = self.choice.empty_past(len(users))
        for step in range(int(steps[0]) + 1):
            n = np.count_nonzero(steps >= step)
            event, belief = offsets[:n] + step, belief[:n]
            before, belief = belief, self._predict_need(belief, event, self.need_logits[event])
            place = np.searchsorted(targets, event)
            wanted = np.flatnonzero(targets[np.minimum(place, len(targets) - 1)] == event)
            if len(wanted) and use_context:
                context = self.dataset.log.context[event[wanted]]
                yield event[wanted], self._score(belief[wanted], event[wanted], past, wanted, context)
            elif len(wanted):
                yield event[wanted], self._score_any_context(before[wanted], event[wanted], past, wanted)
            service = self.service[event]
            for z in range(len(self.base)):
                rows = np.flatnonzero(service == z)
                likelihood = self._likelihood(z, event[rows], past, rows)
                shape = (len(rows), n_needs, *(n_types if kind == z % N_KINDS else 1 for kind in range(N_KINDS)))
                belief[rows] *= likelihood.reshape(shape)
            belief /= belief.sum(axis=tuple(range(1, belief.ndim)), keepdims=True)
            belief *= belief > _NEGLIGIBLE
            self.choice.remember(past, service, self.position[event], self.time[event])

    def _prior(self, users: np.ndarray, use_profile: bool) -> np.ndarray:
        """`[users, 1, K, K, K]` float32: the types by kind before any event, the shared type summed out."""
        shared = np.repeat(self.world.type_prior_K[None], len(users), axis=0)
        if use_profile:
            shared = shared * profile_likelihood(self.world, self.dataset.profile, users)
            shared /= shared.sum(axis=1, keepdims=True)
        given = self.world.type_given_shared()
        return np.einsum("pu,ua,ub,uc->pabc", shared, given, given, given, optimize=True).astype(np.float32)[:, None]

    def _predict_need(self, belief: np.ndarray, event: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Carries `[users, N (1 before the first event), K, K, K]` over to the need of `event`, of `[users, N]`."""
        n_needs = len(self.need_after)
        if belief.shape[1] != n_needs or n_needs == 1:
            start = softmax(logits)
            return start.reshape(start.shape + (1,) * (belief.ndim - 2)) * belief.sum(axis=1, keepdims=True)
        logits = logits[:, None] + self.recency[event, None, None] * self.need_after
        flat = belief.reshape(len(belief), n_needs, -1)
        # contiguous, or numpy leaves BLAS
        transition = np.ascontiguousarray(softmax(logits).transpose(0, 2, 1))
        return np.matmul(transition, flat).reshape(belief.shape)

    def _normalised_weights(
        self, z: int, event: np.ndarray, past: Past, rows: np.ndarray, context: np.ndarray, share_PNZ: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[events, items]` weights of context and past, `[events, N, K]` p(service | need) / Σ_i base * weight."""
        weight_PI = self.choice.weights(z, context, self.time[event], past, rows)
        total = (weight_PI @ self.base[z].T).reshape(len(event), *self.choice.base[z].shape[:2])
        return weight_PI, share_PNZ[:, :, z, None] / total

    def _service_shares(self, event: np.ndarray) -> np.ndarray:
        """`[events, N, Z]`: p(service | need), of those that are open."""
        share_PNZ = self.service_DNZ[self.daypart[event]]
        if self.open_EZ is not None:
            share_PNZ = share_PNZ * self.open_EZ[event][:, None]
            share_PNZ /= share_PNZ.sum(axis=2, keepdims=True)
        return share_PNZ

    def _likelihood(self, z: int, event: np.ndarray, past: Past, rows: np.ndarray) -> np.ndarray:
        """`[events, N, K]`: p(service and item of the event | need, type in `z`), of users in `rows` of `past`."""
        context, share_PNZ = self.dataset.log.context[event], self._service_shares(event)
        weight_PI, factor = self._normalised_weights(z, event, past, rows, context, share_PNZ)
        position = self.position[event]
        chosen = self.choice.base[z][:, :, position].transpose(2, 0, 1)
        return factor * chosen * weight_PI[np.arange(len(event)), position][:, None, None]

    def _score_any_context(self, before: np.ndarray, event: np.ndarray, past: Past, rows: np.ndarray) -> np.ndarray:
        """As `_score`, in the mean over the contexts of the days of each event's month; belief before the event."""
        time = self.time[event]
        contexts, of_day = np.unique(self.world.days, axis=0, return_inverse=True)
        share_MX = np.zeros((12, len(contexts)))
        np.add.at(share_MX, (timeline.month_of_days(), of_day.reshape(-1)), 1)
        share_EX = (share_MX / share_MX.sum(axis=1, keepdims=True))[timeline.month_of(time)]
        total = np.zeros((len(event), len(self.world_item_I)))
        for k, code in enumerate(contexts):
            at = np.flatnonzero(share_EX[:, k])
            if len(at):
                context = np.broadcast_to(code, (len(at), len(code)))
                logits = need_logits(self.world, time[at], context)
                belief = self._predict_need(before[at], event[at], logits)
                total[at] += share_EX[at, k, None] * np.exp(self._score(belief, event[at], past, rows[at], context))
        return np.log(total).astype(np.float32)

    def _score(
        self, belief: np.ndarray, event: np.ndarray, past: Past, rows: np.ndarray, context: np.ndarray
    ) -> np.ndarray:
        """`[events, I]` float32 log p(item) in the data set's numbering; `belief` is that of the events' needs."""
        parts, share_PNZ = [], self._service_shares(event)
        others = [tuple(2 + other for other in range(N_KINDS) if other != kind) for kind in range(N_KINDS)]
        marginal_JPNK = [belief.sum(axis=axes) for axes in others]
        for z in range(len(self.base)):
            weight_PI, factor = self._normalised_weights(z, event, past, rows, context, share_PNZ)
            parts.append((marginal_JPNK[z % N_KINDS] * factor).reshape(len(event), -1) @ self.base[z] * weight_PI)
        probability = np.concatenate(parts, axis=1)
        return np.log(np.maximum(probability[:, self.world_item_I], np.finfo(np.float32).tiny))
