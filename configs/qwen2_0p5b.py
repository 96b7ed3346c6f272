"""Qwen2-0.5B: the real shape, trained on documents on four chips, or begun with imported weights.

Command: python -m experiments.train --config=configs/qwen2_0p5b.py --workdir=runs/qwen2_0p5b
    --config.train.init_from=RUN begins with a run of experiments.import_hf.
    python -m experiments.plan --config=configs/qwen2_0p5b.py --topology=v5e:2x2 compiles the step for a TPU slice.
Hardware: four TPU v5e chips.
Result: planned, not trained: 5.57 of 16.00 GiB of a chip, at most 73.9 % model FLOPs utilisation
(results/language_model.json).
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


def get_config() -> Config:
    """The configuration of this file."""
    return Config(
        name="qwen2_0p5b",
        tasks=("lm",),
        data=DataConfig(
            source="text",
            corpus=CorpusConfig(
                path="../shared/data/text", tokenizer="../shared/data/tokenizer_qwen/tokenizer.json.gz"
            ),
            seq_len=4096,
            history_len=4096,
        ),
        model=ModelConfig(
            n_layers=24,
            d_model=896,
            n_heads=14,
            n_kv_heads=2,
            d_head=64,
            d_ff=4864,
            rope_theta=1e6,
            dropout=0.0,
            compute_dtype="bfloat16",
            remat=True,
            text=TextConfig(vocab_size=151_936, tie_head=True),
        ),
        loss=LossConfig(vocab_chunk=2048),
        optim=OptimConfig(learning_rate=3e-4, warmup_steps=200, b2=0.95, weight_decay=0.1),
        train=TrainConfig(
            steps=2000, batch_size=8, log_every=20, eval_every=200, save_every=200, n_valid=200_000, mesh_data=4
        ),
        eval=EvalConfig(n_probed=0),
        baselines=(),
    )
