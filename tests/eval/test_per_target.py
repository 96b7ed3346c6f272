"""`ranks.npz` against the run's own table, and comparisons target by target against what they are made of."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from experiments import compare as command
from moerec.config import SplitConfig, cli
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.eval.metrics import RankCounts, Ranks, ScoredRanks
from moerec.eval.ranking.per_target import compare_targets, read_ranks, write_ranks
from tests.random_dataset import make_dataset
from tests.tiny import make_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs over the same targets, of one seed and of another."""
    root = tmp_path_factory.mktemp("ranks")
    config = make_config(steps=4)
    split = SplitConfig(kind="leave_one_out", per_service=True)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, split=split), baselines=())
    for seed in (0, 1):
        run_experiment(dataclasses.replace(config, seed=seed), root / str(seed))
    return root / "0", root / "1"


def test_means_over_the_ranks_are_the_table(folders):
    ranks, metrics = read_ranks(folders[0]), json.loads((folders[0] / "metrics.json").read_text())
    union = metrics["test"]["union"]
    assert len(ranks.user) == union["all"]["n"]
    assert ranks.metric("union").mean() == pytest.approx(union["all"]["ndcg@10"], abs=1e-12)
    for service, row in metrics["test"]["in_service"].items():
        own = ranks.service == service
        assert own.sum() == row["n"]
        assert ranks.metric("in_service")[own].mean() == pytest.approx(row["ndcg@10"], abs=1e-12)
    keys = list(zip(ranks.user, ranks.service, ranks.item, strict=True))
    assert keys == sorted(keys)


def test_long_names_are_stored_short_and_told_apart(tmp_path):
    long = "x" * 12_000
    dataset = make_dataset([2] * 40)
    users, ids = dataset.users.astype(object), dataset.catalogue.ids.astype(object)
    users[3], users[7], ids[dataset.log.item[9]] = long + "a", long + "b", "y" * 64
    catalogue = dataclasses.replace(dataset.catalogue, ids=ids)
    dataset, targets = dataclasses.replace(dataset, users=users, catalogue=catalogue), np.arange(1, 80, 2)
    counts = RankCounts(np.zeros(40, np.int64), np.ones(40, np.int64))
    write_ranks(tmp_path / "ranks.npz", dataset, targets, Ranks(counts, counts))
    stored = read_ranks(tmp_path)
    assert stored.user.dtype.itemsize == stored.item.dtype.itemsize == 4 * 64
    assert len(set(stored.user.tolist())) == 40
    assert {*stored.user.tolist()} - {*users.tolist()} == {name for name in stored.user.tolist() if name[:3] == "xxx"}
    assert "y" * 64 in stored.item
    assert np.isnan(stored.log_p).all()
    log_p = np.linspace(-9, -1, 40)
    write_ranks(tmp_path / "ranks.npz", dataset, targets, ScoredRanks(Ranks(counts, counts), log_p))
    scored = read_ranks(tmp_path)
    assert sorted(scored.log_p) == log_p.tolist()
    older = {name: value for name, value in scored._asdict().items() if name != "log_p"}
    np.savez(tmp_path / "ranks.npz", allow_pickle=False, **older)
    assert np.isnan(read_ranks(tmp_path).log_p).all()


def test_differences_are_those_of_the_two_tables(folders):
    tables = [json.loads((folder / "metrics.json").read_text())["test"] for folder in folders]
    result, turned = compare_targets(*folders), compare_targets(*folders[::-1])
    union = result.rows[0]
    assert (union.part, result.n[0]) == ("union all", tables[0]["union"]["all"]["n"])
    services = {row.part: row for row in result.rows[1:]}
    assert set(tables[0]["in_service"]) <= set(services)
    for row, values in [(union, [t["union"]["all"] for t in tables])] + [
        (services[name], [t["in_service"][name] for t in tables]) for name in tables[0]["in_service"]
    ]:
        first, second = (value["ndcg@10"] for value in values)
        assert (row.first, row.second) == pytest.approx((first, second))
        assert row.difference == pytest.approx(first - second)
        assert row.low <= row.difference <= row.high
        assert row.p_value <= row.p_holm <= len(result.rows) * row.p_value
    for row, opposite in zip(result.rows, turned.rows, strict=True):
        assert row.difference == pytest.approx(-opposite.difference)
        assert row.p_value == pytest.approx(opposite.p_value)
    same = compare_targets(folders[0], folders[0]).rows[0]
    assert (same.difference, same.low, same.high, same.p_value, same.n_better) == (0, 0, 0, 1, 0)


def test_rows_of_users_in_several_services(folders, tmp_path):
    """Where all travel, those rows would say everything twice."""
    stored = read_ranks(folders[0])
    for uses_several, expected in ((np.ones(len(stored.user), bool), 0), (stored.user != stored.user[0], 3)):
        folder = tmp_path / str(expected)
        folder.mkdir()
        (folder / "metrics.json").write_bytes((folders[0] / "metrics.json").read_bytes())
        np.savez(folder / "ranks.npz", allow_pickle=False, **stored._replace(uses_several=uses_several)._asdict())
        result = compare_targets(folder, folder)
        rows = {row.part: (row, n) for row, n in zip(result.rows, result.n, strict=True) if "several" in row.part}
        assert len(rows) == expected
        for part, (row, n) in rows.items():
            chosen = uses_several & (stored.service == part.split(",")[0])
            assert n == chosen.sum()
            assert row.first == pytest.approx(stored.metric("in_service")[chosen].mean())


def test_other_targets_and_what_is_no_file_of_ranks_are_refused(folders, tmp_path):
    stored = read_ranks(folders[0])
    (tmp_path / "metrics.json").write_bytes((folders[0] / "metrics.json").read_bytes())
    with pytest.raises(InputError, match="no such file"):
        compare_targets(folders[0], tmp_path)
    masked = json.loads((folders[0] / "metrics.json").read_text())
    masked["config"]["eval"]["mask_seen"] = not masked["config"]["eval"]["mask_seen"]
    np.savez(tmp_path / "ranks.npz", allow_pickle=False, **stored._asdict())
    (tmp_path / "metrics.json").write_text(json.dumps(masked))
    with pytest.raises(InputError, match=r"another data set or eval\.mask_seen"):
        compare_targets(folders[0], tmp_path)
    (tmp_path / "metrics.json").write_bytes((folders[0] / "metrics.json").read_bytes())
    np.savez(tmp_path / "ranks.npz", allow_pickle=False, **stored._replace(item=stored.item[::-1])._asdict())
    with pytest.raises(InputError, match=r"tested on other targets than .*their item differs"):
        compare_targets(folders[0], tmp_path)
    whole = (folders[0] / "ranks.npz").read_bytes()
    damaged = [whole[:k] + bytes([whole[k] ^ 255]) + whole[k + 1 :] for k in range(40, len(whole), len(whole) // 40)]
    np.savez(tmp_path / "uneven.npz", allow_pickle=False, **stored._replace(union=stored.union[:3])._asdict())
    for content in (b"", b"PK\x03\x04", b"abc", (tmp_path / "uneven.npz").read_bytes()):
        (tmp_path / "ranks.npz").write_bytes(content)
        with pytest.raises(InputError, match="holds no ranks"):
            read_ranks(tmp_path)
    for other in (
        stored._replace(**{name: getattr(stored, name)[:0] for name in stored._fields}),
        stored._replace(user=stored.user[0]),
        stored._replace(union=stored.union[:, 0]),
        stored._replace(union=stored.union + 0.5),
        stored._replace(service=np.arange(len(stored.user))),
    ):
        np.savez(tmp_path / "ranks.npz", allow_pickle=False, **other._asdict())
        with pytest.raises(InputError, match="holds no ranks"):
            read_ranks(tmp_path)
    for content in damaged:
        (tmp_path / "ranks.npz").write_bytes(content)
        with contextlib.suppress(InputError):  # and nothing else
            read_ranks(tmp_path)


def test_the_command_pairs_single_runs_by_target(folders, capsys):
    flags = [f"--first={folders[0]}", f"--second={folders[1]}", "--json"]
    code = cli.execute(command.main, ["compare", *flags], None, command.FLAGS, config_type=None, workdir=False)
    said = capsys.readouterr().out
    assert code == 0
    assert "paired by target" in said
    assert json.loads(said.splitlines()[-1])["rows"][0]["part"] == "union all"
