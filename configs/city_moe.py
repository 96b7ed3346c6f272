"""Domain experts and a pointer mixture on the built-in world: one joint model over three services.

Command: python -m experiments.train --config=configs/city_moe.py --workdir=runs/city_moe
Hardware: two CPU cores.
Result: union NDCG@10 .2369, mean of five worlds; configs/city_dense.py, of as many active parameters, .2216 (paired t,
p .0015). The pointer mixture accounts for the gain (results/city_experts.json).
"""

import dataclasses

from configs import city_dense
from moerec.config import Config, MoEConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = city_dense.get_config()
    # In the second of two layers an expert that sees every slot, and two of eight a sixth as wide.
    moe = MoEConfig(layers=(1,), n_per_group=2, n_active=2, d_expert=32, d_shared=128)
    model = dataclasses.replace(base.model, d_ff=192, moe=moe, pointer="services")
    return dataclasses.replace(base, name="city_moe", model=model)
