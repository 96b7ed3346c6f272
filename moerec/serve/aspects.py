"""What the aspects of a profile stand for: the attributes whose items write into them."""

import numpy as np

from moerec.data.dataset import ItemTable
from moerec.eval.probes.profile_aspects import written_by_items
from moerec.nn.model import SequenceModel
from moerec.types import Catalog

N_TOKENS = 3  # attributes that name an aspect
LEAST_SHARE = 0.005  # of all that is written, of an attribute that may name one
LEAST_EVENTS = 20  # of an item that may, where there are no attributes


def name_aspects(catalogue: ItemTable, model: SequenceModel, table: Catalog) -> list[dict[str, float]]:
    """For each aspect the attributes that stand out in what is written into it, items weighed by their training count.

    Where the catalogue has no attributes, the items themselves are named.
    """
    written_IX = written_by_items(model, table)
    tokens = [text.split() or [str(name)] for text, name in zip(catalogue.attributes, catalogue.ids, strict=True)]
    known, code = np.unique(np.concatenate(tokens), return_inverse=True)
    owner = np.repeat(np.arange(len(tokens)), [len(found) for found in tokens])
    of_token_XX = np.stack([np.bincount(code, column[owner], len(known)) for column in written_IX.T], axis=1)
    total_X = of_token_XX.sum(axis=1)
    everything_X = np.maximum(written_IX.sum(axis=0), 1e-30)
    lift_XX = (of_token_XX / everything_X) / np.maximum(total_X / everything_X.sum(), 1e-30)[:, None]
    is_attribute_X = np.isin(known, np.concatenate([text.split() for text in catalogue.attributes]))
    least_X = np.where(is_attribute_X, LEAST_SHARE * everything_X.sum(), LEAST_EVENTS)
    lift_XX = np.where((total_X >= least_X)[:, None], lift_XX, 0)
    best_XX = np.argsort(-lift_XX, axis=0, kind="stable")[:N_TOKENS]
    return [
        {str(known[x]): float(lift_XX[x, a]) for x in best_X if lift_XX[x, a] > 1} for a, best_X in enumerate(best_XX.T)
    ]
