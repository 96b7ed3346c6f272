"""What a trained model's predictions owe to the profile and to the context: they are taken from others, or taken away.

The parameters stay as they are, so that a difference is what this model makes of the knowledge, not what another model
would make without it.
"""

from typing import Any

import numpy as np

from moerec.config import Config
from moerec.eval.metrics import per_target_metrics
from moerec.eval.ranking import EvalDataset, rank_targets
from moerec.eval.ranking.rank import Intervention
from moerec.eval.significance import paired_test
from moerec.nn.model import Predictor
from moerec.nn.profile import count_profile_slots
from moerec.nn.profile.profile_router import MEAN_PROFILE, NO_PROFILE
from moerec.types import Batch, Catalog


def choose_sources(batch: Batch, user: np.ndarray) -> np.ndarray:
    """`[B, T]` flat slot whose profile each slot gets: that of the next user in the batch, as far into their history.

    Where theirs is shorter, it is their last one. The last user gets the first one's; one alone keeps their own.

    Args:
      user: `[sequences]`, whose each is, in the order of the batch; those of a user stand together.
    """
    source = np.arange(batch.segment_BT.size)
    slot = np.flatnonzero(batch.segment_BT > 0)
    position = batch.position_BT.reshape(-1)[slot]
    sequence = np.cumsum(position == 0) - 1
    start, length = slot[position == 0], np.bincount(sequence)
    is_first = np.append(True, user[1:] != user[:-1])[: len(user)]
    first = np.flatnonzero(is_first)  # the first sequence of each user
    other = first[np.cumsum(is_first) % len(first)][sequence] if len(first) else sequence
    source[slot] = start[other] + np.minimum(position, length[other] - 1)
    return source.reshape(batch.segment_BT.shape).astype(np.int32)


def _with_context(batch: Batch, context_BTC: np.ndarray) -> Batch:
    return batch._replace(request=batch.request._replace(context_BTC=context_BTC))


def permute_context(batch: Batch, rng: np.random.Generator) -> Batch:
    """The batch with the context of every sequence's requests in a random order; clocks stay as they are."""
    segment = batch.segment_BT.reshape(-1)
    slot = np.flatnonzero(segment > 0)
    user = np.cumsum(batch.position_BT.reshape(-1)[slot] == 0)
    context = batch.request.context_BTC.copy()
    flat = context.reshape(-1, context.shape[-1])
    flat[slot] = flat[slot[np.lexsort((rng.random(len(slot)), user))]]
    return _with_context(batch, context)


def _list_interventions(config: Config, examples: EvalDataset) -> dict[str, dict[str, Intervention]]:
    """What is done to what, where the model has it."""
    rng = np.random.default_rng(config.seed)

    def give(source: int) -> Intervention:
        return lambda batch, _: (batch, np.full(batch.segment_BT.shape, source, np.int32))

    profile: dict[str, Intervention] = {
        "swapped": lambda batch, user: (batch, choose_sources(batch, user)),
        "mean": give(MEAN_PROFILE),
        "empty": give(NO_PROFILE),
    }
    context: dict[str, Intervention] = {
        "permuted": lambda batch, _: (permute_context(batch, rng), None),
        "missing": lambda batch, _: (
            _with_context(batch, np.zeros_like(batch.request.context_BTC)),
            None,
        ),
    }
    interventions = {}
    if count_profile_slots(config.model):
        interventions["profile"] = profile
    if config.model.request_context and examples.dataset.context:
        interventions["context"] = context
    return interventions


def evaluate_interventions(
    config: Config, predictor: Predictor, examples: EvalDataset, catalog: Catalog, own: np.ndarray
) -> dict[str, dict[str, dict[str, float]]]:
    """`{part: {intervention: {"ndcg@10", "difference", "p_value"}}}` in the union; `difference` is what is lost by it.

    The mean profile is that of all slots of the batch. What is open (`data.city.n_closed`) is context like any other. A
    missing context means something to a model only if some was missing in training, or hidden by
    `model.context_dropout`; to another it is as if nothing had been learnt of it.

    Args:
      own: `[targets]`, NDCG@10 of the model as it is.
    """
    found: dict[str, Any] = {}
    for part, interventions in _list_interventions(config, examples).items():
        for name, intervention in interventions.items():
            union = rank_targets(predictor, examples, catalog, intervention).union
            other = per_target_metrics(union)["ndcg@10"]
            test = paired_test(own, other, config.seed, examples.user)
            outcome = {"ndcg@10": float(other.mean()), "difference": test.difference, "p_value": test.p_value}
            found.setdefault(part, {})[name] = outcome
    return found
