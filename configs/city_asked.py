"""Every service asked, with experts of its own, on the built-in world: three services with dynamics of their own.

Command: python -m experiments.train --config=configs/city_asked.py --workdir=runs/city_asked, with
    --config.model.moe.layers='()' --config.model.d_ff=144 for one feed-forward layer that all services share, and
    --config.data.city.own_dynamics=0 for the world in which services differ in their catalogues alone.
Hardware: two CPU cores.
Result: excess log-loss over the exact posterior .425 nats, union NDCG@10 .2775, mean of five worlds; .422 and .2782
with one shared layer, a dense decoder .646 and .2656; all with dynamics (results/asking.json).
"""

import dataclasses

from configs import city_dense
from moerec.config import AskConfig, Config, MoEConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = city_dense.get_config()
    # A hypothesis opens the asked service's expert and the cross expert, a third as wide as the shared one each.
    moe = MoEConfig(layers=(1,), n_per_group=1, n_active=2, d_expert=48, d_shared=47, bias_rate=0.0)
    ask = AskConfig(from_layer=1, analyser_layers=1, d_analyser=32)
    # On the marketplace a thing is seldom bought twice: the softmax knows what the history has.
    model = dataclasses.replace(base.model, d_ff=143, moe=moe, ask=ask, pointer="services", repeat_bias=True)
    model = dataclasses.replace(model, untrained_rows=False)
    city = dataclasses.replace(base.data.city, own_dynamics=1.0)
    return dataclasses.replace(base, name="city_asked", model=model, data=dataclasses.replace(base.data, city=city))
