"""The dense decoder on the built-in world: what configs/city_moe.py is compared with.

Command: python -m experiments.train --config=configs/city_dense.py --workdir=runs/city_dense
Hardware: two CPU cores.
Result: union NDCG@10 .2216, mean of five worlds (results/city_experts.json).
"""

from moerec.config import Config, DataConfig, EvalConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    """The configuration of this file."""
    return Config(
        name="city_dense",
        # As measured: without a control slot, from which first events are predicted.
        data=DataConfig(source="city", seq_len=128, history_len=128, first_event=False),
        # The width makes as many parameters as are active in the mixture.
        # All items are trained; without the parts for others the model is the one that was measured.
        model=ModelConfig(untrained_rows=True, n_layers=2, d_model=64, d_ff=238, dropout=0.1, event_time=True),
        loss=LossConfig(kind="full_softmax"),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50, weight_decay=0.1, ema_decay=0.98),
        train=TrainConfig(steps=500, batch_size=16, log_every=25, eval_every=250, save_every=250, n_valid=2000),
        # Nearly half of the city's orders repeat an earlier one, so seen items stay candidates.
        eval=EvalConfig(mask_seen=False),
        baselines=("graph_text", "graph_text_own"),  # configs/demo.py has all
    )
