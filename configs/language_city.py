"""Texts of the built-in world in Russian and English, as a small language model reads them: a check of a minute.

Command: python -m experiments.train --config=configs/language_city.py --workdir=runs/language_city
Hardware: two CPU cores, less than a minute.
Result: not measured yet, a model of 301,920 parameters (results/language_model.json).
"""

from moerec.config import (
    CityConfig,
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The configuration of this file."""
    kinds = ("descriptions", "reviews", "questions", "instructions")
    return Config(
        name="language_city",
        tasks=("lm",),
        data=DataConfig(
            source="text",
            city=CityConfig(items_per_service=200),
            corpus=CorpusConfig(
                sources=tuple(f"{kind}=city:{kind}" for kind in kinds),
                weights=tuple(f"{kind}=1" for kind in kinds),
                city_documents=1500,
                vocab_size=1024,
                valid_fraction=0.05,
            ),
            seq_len=128,
            history_len=128,
        ),
        model=ModelConfig(
            n_layers=2,
            d_model=96,
            n_heads=4,
            n_kv_heads=2,
            d_head=24,
            d_ff=256,
            rope_theta=1e4,
            dropout=0.0,
            text=TextConfig(vocab_size=1024, tie_head=True),
        ),
        loss=LossConfig(vocab_chunk=512),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=20, b2=0.95, weight_decay=0.1),
        train=TrainConfig(steps=300, batch_size=8, log_every=20, eval_every=100, save_every=100, n_valid=10_000),
        eval=EvalConfig(n_probed=0),
        baselines=(),
    )
