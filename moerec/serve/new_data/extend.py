"""A trained run that knows of new users, events and items; nothing is retrained.

An item without a trained row has the vector and the bias that the model gives to all such items, its text, its
attributes and its service; its neighbors by text are found as those of the catalogue were.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from moerec.data.dataset import ItemTable
from moerec.data.load import RunData
from moerec.data.neighbors import (
    NEIGHBOR_FILES,
    ItemNames,
    Neighbors,
    NeighborTable,
    extend_text_neighbors,
    load_neighbors,
)
from moerec.data.text.item_states import open_store, standardise_like
from moerec.nn.model import Predictor, SequenceModel
from moerec.serve.new_data.merge import Additions, Joined, join_new
from moerec.serve.new_data.read import find_schema, read_new_tables
from moerec.train.base_model.item_states import encode_items
from moerec.train.run_dir import Run, load_run, make_sizes


def open_extended(workdir: str, interactions: str, items: str, users: str, notes: TextIO) -> Run:
    """A finished run, with new tables where paths are not empty; what is new goes to `notes`, line by line.

    Raises:
      InputError: as `load_run` and `extend_run`.
    """
    run = load_run(workdir)
    if not (interactions or items or users):
        return run
    run, additions = extend_run(run, interactions, items, users)
    print("\n".join(additions.describe()), file=notes)
    return run


def extend_run(
    run: Run,
    interactions: str | Path | None = None,
    items: str | Path | None = None,
    users: str | Path | None = None,
) -> tuple[Run, Additions]:
    """The run with what new tables hold, and what of it is new; the directory of the run stays as it is.

    Args: paths of tables with the columns of the run's own (`data.schema`); of the built-in world `CITY_SCHEMA`.

    Raises:
      InputError: a table cannot be read, or has another form than the run's.
    """
    paths = (None if path is None or path == "" else Path(path) for path in (interactions, items, users))
    new = read_new_tables(run, *paths)
    joined = join_new(run.data, find_schema(run)[0], new)
    data = _describe_items(run, joined)
    predictor = run.predictor
    if joined.additions.items:
        predictor = _extend_predictor(run, data, joined.number)
    extended = Run(run.folder)
    vars(extended).update(config=run.config, metrics=run.metrics, data=data, predictor=predictor)
    return extended, joined.additions


def _describe_items(run: Run, joined: Joined) -> RunData:
    """The joined data with what the model reads of all items: tokens, neighbors and states."""
    old, data = run.data, joined.data
    catalogue = data.dataset.catalogue
    states = None
    if old.item_states is not None:
        new = np.setdiff1d(np.arange(catalogue.n_items), joined.number)
        states = np.zeros((catalogue.n_items, old.item_states.shape[1]), np.float32)
        states[joined.number] = old.item_states
        if len(new):
            own = Run(run.folder).data  # the states that are stored are of the run's items, with none that were added
            store = open_store(own.folder or run.folder, own.dataset.catalogue, own.item_number, model=None)
            states[new] = standardise_like(encode_items(run.config, catalogue.text[new].tolist()), store.read())
    return dataclasses.replace(
        data,
        tokens=old.item_tokens.encode_items(catalogue.text, catalogue.attributes).trim(),
        neighbors={name: _extend_neighbors(run, name, catalogue) for name in old.neighbors},
        item_states=states,
    )


def _extend_neighbors(run: Run, name: str, new: ItemTable) -> Neighbors:
    """A table for all items: texts of new ones are compared, transitions of new ones have not been seen."""
    old = run.data.dataset.catalogue
    # A table that was extended beside the run has more items than the run: what is of the run's is taken.
    table = NeighborTable(ItemNames.of(old), run.data.neighbors[name])
    if name != "text":
        return table.align(new)
    stored = load_neighbors(run.folder / NEIGHBOR_FILES[name])
    return extend_text_neighbors(dataclasses.replace(table, counts=stored.counts), old, new).neighbors


def _extend_predictor(run: Run, data: RunData, number: np.ndarray) -> Predictor:
    """The predictor with rows for the new items, where parameters have one for each item.

    Where untrained items have rows and biases (`model.untrained_rows`), a new one gets the mean of those of its service
    that have the fewest training events: what the model thinks of items that nobody chose.
    """
    sizes = make_sizes(run.config, data)
    shapes = jax.eval_shape(lambda: SequenceModel(jax.random.key(0), run.config.model, sizes))
    likes, structure = jax.tree.flatten(shapes)
    n_old = run.data.dataset.catalogue.n_items
    few = _list_least_trained(run.data)
    service_I = data.dataset.catalogue.service
    leaves = []
    for leaf, like in zip(jax.tree.leaves(run.predictor.params), likes, strict=True):
        if leaf.shape == like.shape:
            leaves.append(leaf)
            continue
        assert leaf.shape[0] == n_old
        assert leaf.shape[1:] == like.shape[1:]
        values = np.asarray(leaf)
        rows = np.stack([values[own].mean(axis=0) for own in few])[service_I].astype(values.dtype)
        rows[number] = values
        leaves.append(jax.numpy.asarray(rows))
    return run.predictor._replace(params=jax.tree.unflatten(structure, leaves))


def _list_least_trained(data: RunData) -> list[np.ndarray]:
    """Of each service its items with the fewest training events."""
    count_I, offsets = np.asarray(data.catalog.count_I), data.dataset.catalogue.offsets
    spans = [np.arange(lo, hi) for lo, hi in itertools.pairwise(offsets)]
    return [own[count_I[own] == count_I[own].min()] for own in spans]
