"""Texts of the built-in world in Russian and English, as a small language model reads them: a check of half a minute.

Command: python -m experiments.train --config=configs/language_city.py --workdir=runs/language_city
Hardware: two CPU cores, half a minute.
Result: .2459 bits per byte of held-out documents (results/language.json).
"""

import dataclasses

from configs import language
from moerec.config import CityConfig, Config, CorpusConfig, DataConfig, LossConfig, OptimConfig, TextConfig, TrainConfig

VOCABULARY = 1024
KINDS = ("descriptions", "reviews", "questions", "instructions")


def get_config() -> Config:
    """The configuration of this file."""
    base = language.get_config()
    text = TextConfig(vocab_size=VOCABULARY, tie_head=True)
    return dataclasses.replace(
        base,
        name="language_city",
        data=DataConfig(
            source="text",
            city=CityConfig(items_per_service=200),
            corpus=CorpusConfig(
                sources=tuple(f"{kind}=city:{kind}" for kind in KINDS),
                weights=tuple(f"{kind}=1" for kind in KINDS),
                city_documents=1500,
                vocab_size=VOCABULARY,
                valid_fraction=0.05,
            ),
        ),
        model=dataclasses.replace(base.model, n_layers=2, d_model=96, d_head=24, d_ff=256, text=text),
        loss=LossConfig(vocab_chunk=VOCABULARY),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=20, b2=0.95, weight_decay=0.1),
        train=TrainConfig(steps=300, batch_size=8, log_every=20, eval_every=100, save_every=100, n_valid=10_000),
    )
