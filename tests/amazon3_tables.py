"""A reader of amazon3 for tests alone, so that what they compare with the project shares no code with it."""

import gzip
import os
import pathlib

import numpy as np
import pytest

from moerec.data.dataset import Dataset, EventLog, ItemTable

SERVICES = ("beauty", "sports", "toys")


def data_folder() -> pathlib.Path:
    root = pathlib.Path(__file__).resolve().parents[1]
    folder = pathlib.Path(os.environ.get("MOEREC_DATA", root / "../shared/data")) / "amazon3"
    if not (folder / "interactions.tsv.gz").is_file():
        pytest.skip("needs ../shared/data/amazon3/interactions.tsv.gz")
    return folder


def read_amazon3(services=SERVICES) -> Dataset:
    """Users across the named services, oldest event first, days in published order; raw ids in `catalogue.ids`."""
    with gzip.open(data_folder() / "interactions.tsv.gz", "rt", encoding="utf-8") as lines:
        next(lines)
        rows = [line.split("\t") for line in lines]
    rows = [row for row in rows if row[1] in services]
    service = np.array([services.index(row[1]) for row in rows])
    raw_user, raw, day = (np.array([int(row[k]) for row in rows], np.int64) for k in (0, 3, 4))
    keys, item = np.unique(service * 10**6 + raw, return_inverse=True)
    _, user = np.unique(raw_user, return_inverse=True)
    order = np.lexsort((day, user))
    n_per_service = np.bincount(keys // 10**6, minlength=len(services))
    blank = np.full(len(keys), "")
    catalogue = ItemTable(
        tuple(services), np.concatenate([[0], np.cumsum(n_per_service)]), (keys % 10**6).astype(str), blank, blank
    )
    n = len(rows)
    log = EventLog(
        np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64),
        item[order].astype(np.int32),
        np.zeros(n, np.int16),
        day[order] * 86_400_000_000,
        np.zeros((n, 0), np.int16),
    )
    return Dataset(catalogue, log, np.unique(raw_user).astype(str))
