"""Pretraining on Russian and English texts: plays, novels and help pages, by one small decoder of the Qwen2 family.

Command: python -m experiments.train --config=configs/language.py --workdir=runs/language
    python -m experiments.prepare --config=configs/language.py --out=prepared/language prepares the documents alone;
    --config.data.prepared=prepared/language then trains on them.
Hardware: two CPU cores, 18 minutes.
Result: 1.670 bits per byte of held-out documents; Russian plays 1.359 and novels 1.344, English novels 1.901, help
pages 1.503 (results/language.json).
"""

from moerec.config import (
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

TEXTS = "../shared/data/text"


def get_config() -> Config:
    """The configuration of this file."""
    return Config(
        name="language",
        tasks=("lm",),
        data=DataConfig(
            source="text",
            corpus=CorpusConfig(
                sources=(
                    f"ru_drama={TEXTS}/ru_drama_rusdracor.jsonl.gz",
                    f"ru_novels={TEXTS}/ru_novels_eltec.jsonl.gz",
                    f"en_novels={TEXTS}/en_novels_eltec.jsonl.gz",
                    f"help={TEXTS}/ru_en_libreoffice_help.jsonl.gz",
                ),
                vocab_size=8192,
                valid_fraction=0.06,
            ),
            seq_len=256,
            history_len=256,
            reader="shards",
        ),
        model=ModelConfig(
            n_layers=4,
            d_model=192,
            n_heads=4,
            n_kv_heads=2,
            d_head=48,
            d_ff=512,
            rope_theta=1e4,
            dropout=0.0,
            text=TextConfig(vocab_size=8192, tie_head=True),
        ),
        loss=LossConfig(vocab_chunk=8192),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=100, b2=0.95, weight_decay=0.1),
        train=TrainConfig(steps=4000, batch_size=8, log_every=20, eval_every=250, save_every=1000, n_valid=40_000),
        eval=EvalConfig(n_probed=0),
        baselines=(),
    )
