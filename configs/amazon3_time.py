"""`configs/amazon3.py` once more, with the time of the request known; apart, since published tables have no time.

Command: python -m experiments.train --config=configs/amazon3_time.py --workdir=runs/amazon3_time
Hardware: one CPU core.
Result: recall@10 / NDCG@10 of beauty .1259 / .0743, sports .0777 / .0452, toys .1319 / .0787; 37 minutes
(results/amazon3.json).
"""

import dataclasses

from configs import amazon3
from moerec.config import Config


def get_config() -> Config:
    """The configuration of this file."""
    base = amazon3.get_config()
    return dataclasses.replace(
        base,
        name="amazon3_time",
        model=dataclasses.replace(base.model, event_time=True, request_time=True),
    )
