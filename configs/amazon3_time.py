"""`configs/amazon3.py` once more, with the time of the request known; apart, since published tables have no time.

Command: python -m experiments.train --config=configs/amazon3_time.py --workdir=runs/amazon3_time
Hardware: two CPU cores.
Result: not measured yet; about the time of configs/amazon3.py.
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
