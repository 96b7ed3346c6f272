"""Takes users' profiles in a store further by their events, as a service would, or removes users from it.

python -m experiments.observe --workdir=runs/mine --profiles=DIR [--before=2024-05-01] [--recent=N] [--json]
    [--interactions=new.csv] [--items=new_items.csv] [--forget=NAME,NAME] [--export=FILE.npz]

The store is made where there is none. Each user's last events stay out (`--recent`; by default as many as an answer
reaches by attention, or as a row holds): `experiments.recommend --profiles=DIR` gives them to the model, and the
profile what was before. A later call goes on from there; events since training come from new tables. Who is forgotten
has to leave the data, too, or the next call begins a new profile for them; whoever has none is named.
"""

import sys
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError
from moerec.serve import NEW_TABLES

EMPTY: list[str] = []
FLAGS = {
    **NEW_TABLES,
    "profiles": ("", "the folder of the store"),
    "recent": (-1, "the last events of each user that stay out; -1 for those that an answer reaches"),
    "before": ("", "an ISO date and time, UTC unless it names an offset; events from then on stay out"),
    "forget": (EMPTY, "users whose profiles are removed for good, and none is taken further"),
    "export": ("", "an .npz file for all profiles afterwards"),
}


def main(_, flags):
    """Prints what was done."""
    from moerec.data.splits import parse_date
    from moerec.serve.new_data import open_extended
    from moerec.serve.profiles import count_recent, describe_feed, explain_difference, feed, forget, open_profiles

    if not flags.profiles:
        raise InputError(f"--profiles is missing: {FLAGS['profiles'][1]}")
    if flags.recent < -1:
        raise InputError(f"--recent: {flags.recent} is no number of events")
    before_us = parse_date(flags.before, "--before").time_us if flags.before else None
    run = open_extended(flags.workdir, flags.interactions, flags.items, flags.user_table, sys.stderr)
    store = open_profiles(Path(flags.profiles), params := run.predictor.params, create=not flags.forget)
    if flags.forget:
        absent = forget(store, flags.forget)
        print(f"{len(flags.forget) - len(absent)} forgotten" + (f"; not there: {', '.join(absent)}" if absent else ""))
        found = {"n_forgotten": len(flags.forget) - len(absent), "absent": absent}
    else:
        recent = count_recent(run.config) if flags.recent < 0 else flags.recent
        done = feed(store, params, run.data.dataset, run.catalog, recent, before_us)
        print("\n".join(describe_feed(done, recent, len(store))))
        if reason := explain_difference(run.config, recent) if len(store) else "":
            print(f"answers by these profiles are not those of whole histories: {reason}", file=sys.stderr)
        found = done._asdict()
    if flags.export:
        store.export(flags.export)
    return {**found, "n_stored": len(store)}


if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
