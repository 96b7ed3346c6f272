"""The mixture on the built-in world with a personal second layer: what the profile and the context are worth.

Command: python -m experiments.train --config=configs/city_personal.py --workdir=runs/city_personal
Hardware: two CPU cores.
Result: to come.
"""

import dataclasses

from configs import city_moe
from moerec.config import Config, PersonalConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = city_moe.get_config()
    model = dataclasses.replace(base.model, personal=PersonalConfig(layers=(1,)))
    evaluation = dataclasses.replace(base.eval, effects=True)
    return dataclasses.replace(base, name="city_personal", model=model, eval=evaluation)
