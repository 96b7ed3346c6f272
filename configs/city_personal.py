"""The mixture on the built-in world with a personal second layer, where each layer's attention sees eight events.

Command: python -m experiments.train --config=configs/city_personal.py --workdir=runs/city_personal
Hardware: two CPU cores.
Result: union NDCG@10 .2251, mean of five worlds; .2159 when trained without a profile (results/city_profiles.json).
"""

import dataclasses

from configs import city_moe
from moerec.config import Config, PersonalConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = city_moe.get_config()
    # What lies further back than fifteen events reaches an answer by way of the profile alone.
    model = dataclasses.replace(base.model, window=8, personal=PersonalConfig(layers=(1,)))
    evaluation = dataclasses.replace(base.eval, interventions=True)
    return dataclasses.replace(base, name="city_personal", model=model, eval=evaluation)
