"""Writes everybody's list, or that of a file of users, into one file: one row an item.

python -m experiments.recommend_all --workdir=RUN --out=lists.parquet [--k=10] [--time=2026-01-31T09:00]
    [--context=weather=rain] [--users=FILE] [--services=NAME,NAME] [--exclude=FILE.csv]
    [--interactions=new.csv] [--items=new_items.csv] [--user_table=new_users.csv] [--json]

The columns are user, rank, service, item, text, p (of all items of all services), group (of experts, the one that
weighs most in the answer) and component (what gave most of p). An interrupted call goes on where it was; the file is
there only when it is whole. `--out` may be a .csv, too.
"""

import sys
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError
from moerec.serve import NEW_TABLES

EMPTY: list[str] = []
FLAGS = {
    **NEW_TABLES,
    "out": ("", "the file: .parquet or .csv"),
    "k": (10, "items of a list"),
    "time": ("", "when it is wanted: an ISO date and time, UTC unless it names an offset; later events are no history"),
    "context": ((), "features of the request, as name=value,name=value"),
    "users": ("", "a file of users, one a line; everybody by default"),
    "services": (EMPTY, "services whose items may be listed; all by default"),
    "exclude": ("", "a CSV file of items that are not to be listed: service and item, or as the tables call them"),
}


def main(_, flags):
    """Prints what was written."""
    from moerec.serve.new_data import find_schema, open_extended
    from moerec.serve.recommender import ListOptions, Recommender, read_exclusions, read_users, recommend_all
    from moerec.serve.request import read_request

    if not flags.out:
        raise InputError(f"--out is missing: {FLAGS['out'][1]}")
    if flags["services"].present and not flags.services:
        raise InputError("--services: names none; without the flag all may be listed")
    context = read_request(flags.context, "", "").context
    tables = flags.interactions, flags.items, flags.user_table
    recommender = Recommender(open_extended(flags.workdir, *tables, sys.stderr))
    run, found = recommender.run, recommender.run.data.dataset
    users = read_users(Path(flags.users)) if flags.users else found.users.tolist()
    named = Path(flags.exclude), found.catalogue.services
    exclude = read_exclusions(*named, find_schema(run)[0]) if flags.exclude else ()
    known = recommender.list_known(exclude)
    if len(known) < len(exclude):
        print(f"--exclude: {len(exclude) - len(known):,} of its items are none of the run's", file=sys.stderr)
    options = ListOptions(flags.k, flags.time or None, context, tuple(flags.services) or None, tuple(known))
    done = recommend_all(recommender, users, Path(flags.out), options, tables)
    print(f"{flags.out}: {done.describe()}")
    return done._asdict()


if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
