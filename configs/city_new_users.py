"""The demo's model where a fifth of the users is held out: what the request alone is worth to users without a history.

The first event of each held-out user is predicted from the control slot, that is from time, context and profile fields.

Command: python -m experiments.train --config=configs/city_new_users.py --workdir=runs/city_new_users
Hardware: two CPU cores.
Result: recall@10 of first events .1735 over the union, popularity by service and hour .0825, mean of five worlds
(results/new_users.json).
"""

import dataclasses

from configs import demo
from moerec.config import Config, SplitConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = demo.get_config()
    data = dataclasses.replace(base.data, split=SplitConfig(kind="user", user_fraction=0.2))
    baselines = ("popularity_by_service", "graph_text", "graph_text_own")
    return dataclasses.replace(base, name="city_new_users", data=data, baselines=baselines)
