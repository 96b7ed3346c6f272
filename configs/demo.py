"""The main job on the built-in world: every service asked, with a profile over all, its baselines and the ceiling.

Command: python -m experiments.train --config=configs/demo.py --workdir=runs/demo   (or `make demo`)
Hardware: two CPU cores.
Result: union NDCG@10 .2180; SASRec with full softmax, texts and pointers .1734, ceiling .2497; 85 % of the gap closed
(results/demo.json).
"""

import dataclasses

from configs import city_asked
from moerec.config import DEFAULT_BASELINES, Config, PersonalConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = city_asked.get_config()
    # Fewer steps than the study's: the whole demo is to end in minutes.
    train = dataclasses.replace(base.train, steps=300, eval_every=150, save_every=150)
    # In this world an item that was had is no less wanted: to know of that is worth little.
    model = dataclasses.replace(base.model, personal=PersonalConfig(layers=(1,)), repeat_bias=False)
    city = dataclasses.replace(base.data.city, own_dynamics=0.0)
    data = dataclasses.replace(base.data, city=city, first_event=True)
    return dataclasses.replace(base, name="demo", data=data, model=model, train=train, baselines=DEFAULT_BASELINES)
