"""`configs/amazon3.py` without a look ahead: trained on the past only, and with the ties within a day shuffled.

Published tables have neither: there, a person's later events in other domains are trained on, and the order within a
day is that of the raw item codes, which tells of the target.

Command: python -m experiments.train --config=configs/amazon3_past.py --workdir=runs/amazon3_past
Hardware: one CPU core.
Result: the model is not trained yet; of its baselines, item graph + texts have a mean in-service recall@10 / NDCG@10 of
.0792 / .0469 and a union NDCG@10 of .0417, item-kNN .0561 / .0342 and .0299 (results/graph_text.json).
"""

import dataclasses

from configs import amazon3
from moerec.config import Config


def get_config() -> Config:
    """The configuration of this file."""
    base = amazon3.get_config()
    split = dataclasses.replace(base.data.split, past_only=True, shuffle_ties=True)
    return dataclasses.replace(
        base,
        name="amazon3_past",
        data=dataclasses.replace(base.data, split=split),
        baselines=(*base.baselines, "graph_text"),
    )
