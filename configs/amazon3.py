"""One joint model over three Amazon domains, table split, without request time; compared with the published tables.

Command: python -m experiments.train --config=configs/amazon3.py --workdir=runs/amazon3
Hardware: one CPU core.
Result: recall@10 / NDCG@10 of beauty .1071 / .0632, sports .0664 / .0387, toys .1148 / .0691; 10 minutes
(results/amazon3.json).
"""

from moerec.config import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SchemaConfig,
    SplitConfig,
    TablesConfig,
    TrainConfig,
)


def get_config() -> Config:
    """The configuration of this file."""
    return Config(
        name="amazon3",
        data=DataConfig(
            source="tables",
            tables=TablesConfig(
                folder="../shared/data/amazon3",
                interactions="interactions.tsv.gz",
                items="items.tsv.gz",
                duplicates="keep",
            ),
            schema=SchemaConfig(
                user="user",
                item="item",
                service="domain",
                time="day",
                time_unit="day",
                item_id="s3_item",
                item_service="domain",
                text=("text",),
                attributes=("s3_attributes",),
            ),
            split=SplitConfig(kind="leave_one_out", per_service=True),
            seq_len=128,
            history_len=50,
            max_tokens=12,
            max_attributes=8,
            first_event=False,  # the published protocols predict from a history alone
        ),
        model=ModelConfig(
            untrained_rows=True,  # as measured
            n_layers=1,
            d_model=128,
            n_heads=4,
            n_kv_heads=4,
            d_ff=256,
            dropout=0.5,
            action=False,
            request_time=False,
            request_context=False,
        ),
        loss=LossConfig(kind="sampled_softmax", n_negatives=4096, sampling_power=0.5, scope="service"),
        optim=OptimConfig(
            learning_rate=4e-3, warmup_steps=200, ema_decay=0.998, weight_decay=1.0, decay_embeddings=True
        ),
        train=TrainConfig(steps=3000, batch_size=24, log_every=100, eval_every=500, save_every=500, n_valid=15000),
        eval=EvalConfig(mask_seen=True, selection="in_service"),
        baselines=(
            "popularity",
            "popularity_by_service",
            "popularity_recent",
            "markov",
            "item_knn",
            "graph_text",
            "graph_text_own",
        ),
    )
