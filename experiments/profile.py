"""Shows one user's profile: its aspects, how much they matter to two requests, and what the context changes.

python -m experiments.profile --workdir=runs/demo [--user=NAME] [--time=2024-05-01T09:00,2024-05-04T20:00]
    [--context=holiday=eve] [--vary=weather] [--top_k=5] [--json]

Without `--time` the requests are on the Saturday evening and on the Monday morning after the last event; what
`--context` does not name is as at the last event before the first request, in which the context is varied.
"""

import sys
from pathlib import Path

from moerec.config import cli


def main(_, flags):
    """Prints the profile card."""
    from moerec.serve.profile_card import describe_card, render_card, summarize_profile
    from moerec.serve.request import list_unseen, read_request
    from moerec.train.run_dir import load_run

    context = read_request(flags.context, "", "").context
    asked = [request for text in flags.time if (request := read_request([], text, "")).time is not None]
    run = load_run(Path(flags.workdir))
    for note in list_unseen(run, context):
        print(note, file=sys.stderr)
    dataset = run.data.dataset
    user = flags.user or str(dataset.users[0])
    feature = flags.vary or next(iter(dataset.context), "")
    times, utc_offsets = [request.time or 0 for request in asked], [request.utc_offset for request in asked]
    found = summarize_profile(run, user, times, context, feature, flags.top_k, utc_offsets)
    print(render_card(found))
    return describe_card(found)


EMPTY: list[str] = []
FLAGS = {
    "user": ("", "whose profile; the first user by default"),
    "time": (
        EMPTY,
        "when something is wanted: ISO dates and times, UTC unless they name an offset, that of the place's clock",
    ),
    "context": ((), "features of the requests, as name=value,name=value; may be given several times"),
    "vary": ("", "a feature of the context, whose values are tried in turn; the first by default"),
    "top_k": (5, "items of each list"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
