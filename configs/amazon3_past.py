"""`configs/amazon3.py` without a look ahead: trained on the past only, and with the ties within a day shuffled.

Published tables have neither: there, a person's later events in other domains are trained on, and the order within a
day is that of the raw item codes, which tells of the target. Items without a training event are met as their texts, and
pointers reach the neighbors of events; pointers into the history itself would be idle: no person has an item twice.

Command: python -m experiments.train --config=configs/amazon3_past.py --workdir=runs/amazon3_past
    --config.model.ask.from_layer=1 asks every service.
Hardware: one CPU core.
Result: recall@10 / NDCG@10 of .0922 / .0543 in service and .0496 in the union, the mean of five seeds; item graph +
texts .0792 / .0469 in service and .0417 in the union (results/real_services.json).
"""

import dataclasses

from configs import amazon3
from moerec.config import Config


def get_config() -> Config:
    """The configuration of this file."""
    base = amazon3.get_config()
    split = dataclasses.replace(base.data.split, past_only=True, shuffle_ties=True)
    data = dataclasses.replace(
        base.data, split=split, text_neighbors=64, transition_neighbors=64, crossing_neighbors=64
    )
    model = dataclasses.replace(
        base.model,
        n_layers=2,
        d_model=64,
        d_ff=128,
        untrained_rows=False,
        row_dropout=0.2,
        text_pointer=True,
        transition_pointer=True,
        crossing_pointer=True,
    )
    return dataclasses.replace(
        base,
        name="amazon3_past",
        data=data,
        model=model,
        loss=dataclasses.replace(base.loss, scope="union"),
        optim=dataclasses.replace(base.optim, learning_rate=2e-3, warmup_steps=100, ema_decay=0.99),
        train=dataclasses.replace(base.train, steps=200, eval_every=100, save_every=100, n_valid=8000),
    )
