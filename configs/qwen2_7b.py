"""Qwen2-7B: the real shape, on sixteen chips; parameters and moments are split over all of them.

Command: python -m experiments.plan --config=configs/qwen2_7b.py --topology=v5p:2x2x4
    python -m experiments.train --config=configs/qwen2_7b.py --workdir=runs/qwen2_7b
    --config.train.init_from=RUN begins with a run of experiments.import_hf.
Hardware: sixteen TPU v5p chips.
Result: planned, not trained: 14.68 of 95.00 GiB of a chip, at most 78.2 % model FLOPs utilisation
(results/language_model.json).
"""

import dataclasses

from configs import qwen2_0p5b
from moerec.config import Config, TextConfig


def get_config() -> Config:
    """The configuration of this file."""
    base = qwen2_0p5b.get_config()
    model = dataclasses.replace(
        base.model,
        n_layers=28,
        d_model=3584,
        n_heads=28,
        n_kv_heads=4,
        d_head=128,
        d_ff=18_944,
        text=TextConfig(vocab_size=152_064, tie_head=False),
    )
    train = dataclasses.replace(base.train, batch_size=16, mesh_data=8, mesh_model=2)
    return dataclasses.replace(base, name="qwen2_7b", model=model, train=train)
