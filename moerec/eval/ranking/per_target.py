"""Where each target stood: `ranks.npz` of a run, and two runs compared target by target.

Of one run each: what is tested is the two trained models over the targets, not their trainings over seeds.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moerec.data.dataset import Dataset, find_multi_service_users
from moerec.errors import InputError
from moerec.eval.compare import METRIC, Difference, correct_rows, format_rows, read_run
from moerec.eval.metrics import RankCounts, Ranks, ScoredRanks, per_target_metrics
from moerec.eval.report.result import blamed_on
from moerec.eval.significance import bootstrap_intervals, paired_test
from moerec.files import replacing

FILE = "ranks.npz"
N_BOOT = 2000
_COLUMNS = (
    ("U", 1),
    ("U", 1),
    ("U", 1),
    ("b", 1),
    ("iu", 2),
    ("iu", 2),
    ("f", 1),
)  # of `TargetRanks`: numpy's kinds, and axes
MAX_NAME = 64  # letters of a name in the file


class TargetRanks(NamedTuple):
    """One row a target, in the order of their names.

    Attributes:
      user, service, item: names, str, at most `MAX_NAME` letters long.
      uses_several: bool, whether the user uses several services.
      in_service, union: candidates above and level with the target, int64 `[n, 2]`.
      log_p: float64, log p(item) over the items of all services, seen ones too; nan where nothing has probabilities.
    """

    user: np.ndarray
    service: np.ndarray
    item: np.ndarray
    uses_several: np.ndarray
    in_service: np.ndarray
    union: np.ndarray
    log_p: np.ndarray

    def metric(self, part: str) -> np.ndarray:
        """`METRIC` of each target, ranked in its service or in the union."""
        return per_target_metrics(RankCounts(*getattr(self, part).T))[METRIC]


def write_ranks(path: Path, dataset: Dataset, targets: np.ndarray, ranks: Ranks) -> None:
    """Writes the ranks of rows of the log, atomically."""
    log, catalogue = dataset.log, dataset.catalogue
    user = log.users_of(targets)
    names = [
        _shorten(dataset.users[user].tolist()),
        _shorten([catalogue.services[z] for z in dataset.event_service[targets]]),
        _shorten(catalogue.ids[log.item[targets]].tolist()),
    ]
    columns = [
        *names,
        find_multi_service_users(dataset)[user],
        *(np.stack([p.greater, p.equal], axis=1) for p in (ranks.in_service, ranks.union)),
        ranks.log_p if isinstance(ranks, ScoredRanks) else np.full(len(targets), np.nan),
    ]
    order = np.lexsort(names[::-1])  # of two data sets that hold the same targets, whatever their codes are
    stored = TargetRanks(*(column[order] for column in columns))
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **stored._asdict())


def _shorten(names: list[str]) -> np.ndarray:
    """`[n]` str, in which all take the room of the longest: a long name ends in a digest of the whole of it."""
    cut = MAX_NAME - 16
    return np.array(
        [x if len(x) <= MAX_NAME else x[:cut] + hashlib.sha256(x.encode()).hexdigest()[:16] for x in names], str
    )


def read_ranks(folder: Path) -> TargetRanks:
    """Those of a finished run. Raises InputError where there are none."""
    path = folder / FILE
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in TargetRanks._fields if name in stored.files or name != "log_p"}
            ranks = TargetRanks(**{"log_p": np.full(len(columns["union"]), np.nan), **columns})  # older ones have none
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the run is not finished, or older than this file") from None
    except Exception as error:  # a damaged archive is found out by zipfile, zlib, numpy or the parser of its headers
        raise InputError(f"{path}: holds no ranks ({type(error).__name__}: {error})") from None
    n = ranks.user.size
    if not n or any(column.shape != (n, 2)[:n_axes] for column, (_, n_axes) in zip(ranks, _COLUMNS, strict=True)):
        raise InputError(f"{path}: holds no ranks (its columns are not of one length)")
    if any(column.dtype.kind not in kinds for column, (kinds, _) in zip(ranks, _COLUMNS, strict=True)):
        raise InputError(f"{path}: holds no ranks (its columns are of other types)")
    return ranks


class TargetComparison(NamedTuple):
    """Attributes:
    names: of the two directories. rows: the union first, then each service ranked among its own items, and those of
      its targets whose users use several services. n: targets of each row.
    """

    names: tuple[str, str]
    rows: list[Difference]
    n: list[int]


def compare_targets(first: Path, second: Path) -> TargetComparison:
    """Two runs over the same targets; intervals by bootstrap and p-values by sign flips, both over whole users.

    Raises:
      InputError: a run has no ranks, or the two were tested on other targets or by another rule.
    """
    runs = [read_run(folder) for folder in (first, second)]
    rules = []
    for folder, run in zip((first, second), runs, strict=True):
        with blamed_on(folder / "metrics.json"):
            rules.append((run["dataset"], run["config"]["eval"]["mask_seen"]))
    if rules[0] != rules[1]:
        raise InputError(f"{first}: another data set or eval.mask_seen than {second}")
    a, b = read_ranks(first), read_ranks(second)
    for name in ("user", "service", "item"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise InputError(f"{first}: tested on other targets than {second} (their {name} differs)")
    user = np.unique(a.user, return_inverse=True)[1]
    everything, uses_several = np.ones(len(user), bool), a.uses_several | b.uses_several
    parts = [("union all", "union", everything)]
    for service in dict.fromkeys(a.service.tolist()):
        own = a.service == service
        parts.append((service, "in_service", own))
        if 0 < (own & uses_several).sum() < own.sum():
            parts.append((f"{service}, several services", "in_service", own & uses_several))
    values = {part: (a.metric(part), b.metric(part)) for part in ("in_service", "union")}
    rows = []
    for title, part, chosen in parts:
        own, other = values[part]
        rows.append(_compare(title, own[chosen], other[chosen], user[chosen]))
    return TargetComparison(
        (first.name, second.name), correct_rows(rows), [int(chosen.sum()) for _, _, chosen in parts]
    )


def _compare(title: str, first: np.ndarray, second: np.ndarray, user: np.ndarray) -> Difference:
    gap = first - second
    (interval,) = bootstrap_intervals(gap[:, None], 0, user, N_BOOT)
    tested = paired_test(first, second, 0, user)
    n_better = int(np.sum(gap > 0))
    means = float(first.mean()), float(second.mean())
    return Difference(title, *means, tested.difference, interval.low, interval.high, tested.p_value, n_better)


def render_target_table(comparison: TargetComparison) -> str:
    """The table for a terminal."""
    title = f"{METRIC}, one run each, paired by target (intervals over users, not over trainings)"
    return "\n".join([title, *format_rows(comparison.rows, comparison.names, comparison.n, "better")])
