"""Qwen2-72B: the real shape, on sixty-four chips; parameters and moments are split over all of them.

Command: python -m experiments.plan --config=configs/qwen2_72b.py --topology=v5p:4x4x4
    python -m experiments.train --config=configs/qwen2_72b.py --workdir=runs/qwen2_72b
    --config.train.init_from=RUN begins with a run of experiments.import_hf.
Hardware: sixty-four TPU v5p chips.
Result: planned, not trained: 31.74 of 95.00 GiB of a chip, at most 79.0 % model FLOPs utilisation
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
        n_layers=80,
        d_model=8192,
        n_heads=64,
        n_kv_heads=8,
        d_head=128,
        d_ff=29_568,
        text=TextConfig(vocab_size=152_064, tie_head=False),
    )
    train = dataclasses.replace(base.train, batch_size=16, mesh_data=16, mesh_model=4)
    return dataclasses.replace(base, name="qwen2_72b", model=model, train=train)
