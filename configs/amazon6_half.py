"""Six Amazon services whose persons all use two or more, without anything learned later.

As `configs/amazon3_past.py`; half of the persons, fewer events each in a service, and 39 % of the targets are items
without a training event. Electronics has no texts.

Command: python -m experiments.train --config=configs/amazon6_half.py --workdir=runs/amazon6_half
Hardware: one CPU core.
Result: recall@10 / NDCG@10 of .0596 / .0339 in service and .0238 in the union, the mean of five seeds; item graph +
texts .0485 / .0271 in service and .0198 in the union (results/real_services.json).
"""

import dataclasses

from configs import amazon3_past
from moerec.config import Config


def get_config() -> Config:
    """The configuration of this file."""
    base = amazon3_past.get_config()
    tables = dataclasses.replace(base.data.tables, folder="../shared/data/amazon6_half")
    schema = dataclasses.replace(base.data.schema, item_id="item", attributes=())
    return dataclasses.replace(
        base,
        name="amazon6_half",
        data=dataclasses.replace(base.data, tables=tables, schema=schema, max_tokens=16),
        model=dataclasses.replace(base.model, row_dropout=0.3, n_heads=2, n_kv_heads=2),
        train=dataclasses.replace(base.train, steps=300),
    )
