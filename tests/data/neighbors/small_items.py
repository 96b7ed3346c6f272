"""Small catalogues with texts, and the same in another numbering."""

import dataclasses
import itertools

import numpy as np

from moerec.data.dataset import ItemTable

WORDS = ("tea", "green", "cup", "Red", "ball", "of", "été", "x2", "lamp", "oil")
BRANDS = ("brand=acme", "brand=zeta", "brand=Tea")


def make_items(seed=0, sizes=(12, 0, 9, 1), services=("food", "empty", "toys", "single")):
    """Items with no to six words and no or one brand; the ids of the services overlap."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    text = [" ".join(rng.choice(WORDS, rng.integers(0, 7)).tolist()) for _ in range(n)]
    brand = [str(rng.choice(BRANDS)) if rng.random() < 0.5 else "" for _ in range(n)]
    text[0], brand[0] = "", ""
    ids = [str(k) for size in sizes for k in rng.permutation(100)[:size]]
    return ItemTable(
        tuple(services),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.array(ids, object),
        np.array(text, object),
        np.array(brand, object),
    )


def take_items(catalogue, which):
    """The catalogue of some of the items. Args: their numbers, service by service."""
    service = catalogue.service[which]
    offsets = np.searchsorted(service, np.arange(catalogue.n_services + 1))
    return dataclasses.replace(
        catalogue,
        offsets=offsets,
        ids=catalogue.ids[which],
        text=catalogue.text[which],
        attributes=catalogue.attributes[which],
    )


def shuffle_items(catalogue, seed):
    """The numbers of the items in another order within their services."""
    rng = np.random.default_rng(seed)
    edges = catalogue.offsets
    return np.concatenate([lo + rng.permutation(hi - lo) for lo, hi in itertools.pairwise(edges)])


def name_neighbors(catalogue, neighbors):
    """(service, id) -> [(service, id, similarity), …]."""
    named = [(catalogue.services[z], name) for z, name in zip(catalogue.service.tolist(), catalogue.ids, strict=True)]
    rows = zip(*(x.tolist() for x in neighbors), strict=True)
    return {
        own: [(*named[i], s) for i, s in zip(*row, strict=True) if i >= 0] for own, row in zip(named, rows, strict=True)
    }
