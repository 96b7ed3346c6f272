"""A run that is over in seconds: the built-in world, shrunk."""

from moerec.config import CityConfig, Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig


def make_config(**train) -> Config:
    """A tiny configuration; keywords replace fields of `train`."""
    steps = {"steps": 12, "batch_size": 4, "log_every": 2, "eval_every": 4, "save_every": 3, "n_valid": 40}
    return Config(
        name="tiny",
        data=DataConfig(
            city=CityConfig(n_users=60, events_per_user=12, items_per_service=30), seq_len=32, history_len=16
        ),
        model=ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, d_text=8),
        loss=LossConfig(kind="full_softmax", chunk=64),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=3, ema_decay=0.9),
        train=TrainConfig(**{**steps, **train}),
        eval=EvalConfig(mask_seen=False, batch_size=32, n_boot=50),
        baselines=("popularity", "markov"),
    )
