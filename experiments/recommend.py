"""Lists what users most probably want next, by the best parameters of a run.

python -m experiments.recommend --workdir=runs/demo --user=NAME [--user=NAME …] [--context=weather=rain,holiday=yes]
    [--time=2024-05-01T09:00] [--service=kuper] [--top_k=10] [--profiles=DIR] [--fields=age=35-49] [--new_user]
    [--interactions=new.csv] [--items=new_items.csv] [--user_table=new_users.csv] [--mass=.99] [--json]

Without `--time` and `--context` they are not known; `--time` is UTC or names an offset, its place's clock. `p` is the
probability that the item is taken next, of all items of all services, if that is what the model was trained for. With
`--profiles`, a store of `experiments.observe`, the whole past counts. New events, items and users come from tables with
the columns of the run's own; nothing is retrained. Who has no event before the time, or is new (`--new_user`), is
answered by the request alone. Below the list stands what the model made of the request: the services that its need may
belong to (semantic analyser), what each answers (answer aggregator), and what of the profile matters (profile router).
"""

import sys
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError
from moerec.serve import NEW_TABLES


def main(_, flags):
    """Prints each user's history and list, and what the model made of the request."""
    from moerec.serve.explained import answer_users
    from moerec.serve.new_data import open_extended
    from moerec.serve.request import list_unseen, read_request

    if flags.new_user and (flags.user or flags.profiles):
        raise InputError("--new_user: has no name and no profile; leave --user and --profiles out")
    request = read_request(flags.context, flags.time, flags.service, flags.fields)
    run = open_extended(flags.workdir, flags.interactions, flags.items, flags.user_table, sys.stderr)
    for note in list_unseen(run, request.context):
        print(note, file=sys.stderr)
    users = [None] if flags.new_user else flags.user or [str(run.data.dataset.users[0])]
    profiles = Path(flags.profiles) if flags.profiles else None
    found = answer_users(run, users, request, flags.top_k, profiles, flags.mass, sys.stderr)
    for number, answer in enumerate(found):
        print("\n" * (number > 0) + "\n".join(answer.pop("lines")))
    return found[0] if len(found) == 1 else {"users": found}


FLAGS = {
    **NEW_TABLES,
    "user": ((), "whose list; may be given several times; the first user by default"),
    "new_user": (False, "a user of whom nothing is known but the request"),
    "fields": ((), "static profile fields, as name=value,name=value, in the place of the user's own"),
    "context": ((), "features of the request, as name=value,name=value; may be given several times"),
    "time": ("", "when it is wanted: an ISO date and time, UTC unless it names an offset; later events are no history"),
    "service": ("", "a service, for a list of its items alone"),
    "profiles": ("", "a store of profiles, made by experiments.observe"),
    "top_k": (10, "items of the list"),
    "mass": (1.0, "where services are asked: only the most probable ones, with this much of the posterior"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
