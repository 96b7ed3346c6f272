"""One request of the test set and what every service answers, as a report shows it."""

import dataclasses
from typing import Any

import numpy as np

from moerec.config import Config
from moerec.data.dataset import SECOND_US, UNKNOWN_TIME, Dataset
from moerec.eval.probes.answers import ask_services, describe_asked
from moerec.eval.ranking import EvalDataset
from moerec.nn.model import Predictor
from moerec.types import Catalog

N_LISTED = 5


def pick_row(config: Config, sample: EvalDataset) -> int:
    """The row of the target with the longest history, of those that are candidates if there are any."""
    is_hidden = sample.is_repeated & config.eval.mask_seen
    return int(sample.targets[np.argmax(np.where(is_hidden, -1, sample.history_len))])


def describe_example(
    config: Config, dataset: Dataset, row: int, predictor: Predictor, catalog: Catalog
) -> dict[str, Any]:
    """`metrics["example"]`: whose request it is and when (UTC), the last events before it, the target, the posterior,
    and each service's answer.

    A service's answer has its weight, the shares of its components and experts, and its best items with what each
    component gave of them; the items of the history are left out where they are no candidates (`eval.mask_seen`).

    Args: the target's row in the log, before which there is a slot to ask at; a catalogue bound to the predictor.
    """
    alone = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=1))
    examples, catalogue = EvalDataset(dataset, np.array([row]), alone), dataset.catalogue
    ((_, batch, queries),) = examples.batches()
    allowed = np.ones(catalogue.n_items, bool)
    seen = np.asarray(queries.seen[0])
    allowed[seen[seen >= 0]] = False
    slot = int(queries.slot[0])
    _, found = ask_services(predictor, catalog, batch, slot, None, allowed, N_LISTED, 1.0, None)
    services, _ = describe_asked(config.model, catalogue, found)

    def name(item: int) -> dict[str, str]:
        return {
            "service": catalogue.services[catalogue.service[item]],
            "id": str(catalogue.ids[item]),
            "text": str(catalogue.text[item]),
        }

    before, time_us = examples.histories.last(N_LISTED).rows, dataset.log.time_us[row]
    time = None if time_us == UNKNOWN_TIME else str(np.datetime64(int(time_us) // SECOND_US, "s"))
    return {
        "user": str(dataset.users[dataset.log.users_of(np.array([row]))[0]]),
        "time": time,
        "history": [name(item) for item in dataset.log.item[before].tolist()],
        "target": name(int(dataset.log.item[row])),
        "domain": dict(zip(catalogue.services, map(float, found.domain), strict=True)),
        "services": services,
    }
