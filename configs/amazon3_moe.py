"""Domain experts on three Amazon domains, at the active parameters and the training budget of configs/amazon3.py.

Command: python -m experiments.train --config=configs/amazon3_moe.py --workdir=runs/amazon3_moe
Hardware: one CPU core.
Result: recall@10 / NDCG@10 of beauty .108 / .063, sports .065 / .038, toys .117 / .071; 43 minutes
(results/amazon3.json).
"""

import dataclasses

from configs import amazon3
from moerec.config import Config, MoEConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = amazon3.get_config()
    # Two experts of half the dense width a slot. The only layer is a mixture: its analyser sees a single event.
    moe = MoEConfig(layers=(0,), n_per_group=2, d_expert=base.model.d_ff // 2, n_active=2)
    return dataclasses.replace(base, name="amazon3_moe", model=dataclasses.replace(base.model, moe=moe))
