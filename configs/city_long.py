"""Histories of about 2,000 events whose targets depend on what lies 500 to 2,000 back: attention, a window, a profile.

Each service in turn is closed to a user for 500 events, and the last event is the return to one; the context tells
what is open. Tastes are private to a service (rho = 0), so that nothing nearer tells what they like there. Validation
is on the events before the last, which are ordinary ones; it selects nothing, since it is made once.

Command: python -m experiments.train --config=configs/city_long.py --workdir=runs/city_long, with
    --config.model.window=0 --config.model.personal.memory=null for attention over everything, or
    --config.model.personal.memory=null for the window alone.
Hardware: two CPU cores.
Result: union NDCG@10 .2828, mean of five worlds; .3802 with attention over everything, .1140 with the window alone
(results/long_history.json).
"""

from moerec.config import (
    CityConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PersonalConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The configuration of this file."""
    city = CityConfig(n_users=1000, events_per_user=2000, items_per_service=200, rho=0.0, n_closed=500)
    return Config(
        name="city_long",
        data=DataConfig(source="city", city=city, seq_len=2048, history_len=2048, first_event=False),
        model=ModelConfig(
            n_layers=2,
            d_model=64,
            d_ff=192,
            dropout=0.1,
            event_time=True,
            window=128,
            personal=PersonalConfig(layers=(1,), query_scale=False, pair_bias=False),
        ),
        loss=LossConfig(kind="full_softmax"),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1, ema_decay=0.98),
        train=TrainConfig(steps=1000, batch_size=2, log_every=50, eval_every=0, save_every=500, n_valid=64),
        eval=EvalConfig(mask_seen=False, batch_size=32),
        baselines=("popularity_by_service", "graph_text", "graph_text_own"),
    )
