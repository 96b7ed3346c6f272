"""Domain experts on the built-in world, at the active parameters and the training budget of configs/demo.py.

Command: python -m experiments.train --config=configs/city_moe.py --workdir=runs/city_moe
Hardware: two CPU cores.
Result: union NDCG@10 .199 (dense .202, ceiling .250; seeds 0, 1 and 3 of one world): no better than configs/demo.py.
"""

import dataclasses

from configs import demo
from moerec.config import Config, MoEConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = demo.get_config()
    # Two experts of half the dense width a slot, in the second of two layers.
    moe = MoEConfig(layers=(1,), n_per_group=2, d_expert=base.model.d_ff // 2, n_active=2)
    return dataclasses.replace(base, name="city_moe", model=dataclasses.replace(base.model, moe=moe))
