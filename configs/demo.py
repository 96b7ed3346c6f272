"""The main job on the built-in world: a joint model over three services, its baselines and the exact ceiling.

Command: python -m experiments.train --config=configs/demo.py --workdir=runs/demo   (or `make demo`)
Hardware: two CPU cores.
Result: union NDCG@10 .203; SASRec with sampled softmax .135, ceiling .250; 78 % of the gap closed; 5 minutes.
"""

from moerec.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The configuration of this file."""
    return Config(
        name="demo",
        data=DataConfig(source="city", seq_len=128, history_len=128),
        model=ModelConfig(n_layers=2, d_model=64, d_ff=192, dropout=0.1, event_time=True),
        loss=LossConfig(kind="full_softmax"),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1, ema_decay=0.98),
        train=TrainConfig(steps=500, batch_size=16, log_every=25, eval_every=100, save_every=200, n_valid=2000),
        # Nearly half of the city's orders repeat an earlier one, so seen items stay candidates.
        eval=EvalConfig(mask_seen=False),
    )
