"""Lists what a user most probably wants next, by the best parameters of a run.

python -m experiments.recommend --workdir=runs/demo --user=NAME [--context=weather=rain,holiday=yes]
    [--time=2024-05-01T09:00] [--service=kuper] [--top_k=10] [--profiles=DIR] [--fields=age=35-49] [--new_user]
    [--mass=.99] [--json]

Without `--time` and `--context` they are not known; `--time` is UTC or names an offset, its place's clock. `p` is the
probability that the item is taken next, of all items of all services, if that is what the model was trained for. With
`--profiles`, a store of `experiments.observe`, the whole past counts. Who has no event before the time, or is new
(`--new_user`), is answered by the request alone, its fields included. Below the list stands what the model made of the
request: the services that its need may belong to (semantic analyser); what each answers, with its weight, experts and
components, or the mixture's weights (answer aggregator); and what of the profile matters (profile router).
"""

import sys
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags):
    """Prints the list, and what the model made of the request."""
    from moerec.serve.recommender import describe_answer, recall_profile, recommend
    from moerec.serve.request import list_unseen, read_request
    from moerec.train.run_dir import load_run

    if flags.new_user and (flags.user or flags.profiles):
        raise InputError("--new_user: has no name and no profile; leave --user and --profiles out")
    request = read_request(flags.context, flags.time, flags.service, flags.fields)
    run = load_run(Path(flags.workdir))
    user = None if flags.new_user else flags.user or str(run.data.dataset.users[0])
    profile, notes = recall_profile(run, user, request, Path(flags.profiles) if flags.profiles else None)
    for note in [*list_unseen(run, request.context), *notes]:
        print(note, file=sys.stderr)
    answer = recommend(run, user, request, flags.top_k, profile, flags.mass)
    if flags.profiles and profile is None:
        answer = answer._replace(relevance=None)
    found = describe_answer(run, answer)
    print("\n".join(found.pop("lines")))
    return found


FLAGS = {
    "user": ("", "whose list; the first user by default"),
    "new_user": (False, "a user of whom nothing is known but the request"),
    "fields": ((), "static profile fields, as name=value,name=value, in the place of the user's own"),
    "context": ((), "features of the request, as name=value,name=value; may be given several times"),
    "time": ("", "when it is wanted: an ISO date and time, UTC unless it names an offset; later events are no history"),
    "service": ("", "a service, for a list of its items alone"),
    "profiles": ("", "a store of profiles, made by experiments.observe"),
    "top_k": (10, "items of the list"),
    "mass": (
        1.0,
        "where services are asked: only the most probable ones, with this much of the posterior",
    ),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
