"""One dense joint model over six Amazon services whose persons all use two or more, without anything learned later.

Leave-one-out per service and past only: neither training nor a history holds an event of another service that is not
strictly earlier. Times are whole days, and 39 % of the events share theirs with another one of the same person and
service; within a day the tables are sorted by item, which would tell of the target, so ties are shuffled. Electronics
has no texts. Pointers into the history would be idle: no person has an item twice, and seen items are masked.

Command: python -m experiments.train --config=configs/amazon6_half.py --workdir=runs/amazon6_half
Hardware: one CPU core.
Result: the model is not trained yet; of its baselines, item graph + texts have a mean in-service recall@10 / NDCG@10 of
.0485 / .0271 and a union NDCG@10 of .0198, item-kNN .0150 / .0086 and .0045 (results/graph_text.json).
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
        name="amazon6_half",
        data=DataConfig(
            source="tables",
            tables=TablesConfig(
                folder="../shared/data/amazon6_half",
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
                item_id="item",
                item_service="domain",
                text=("text",),
            ),
            split=SplitConfig(kind="leave_one_out", per_service=True, past_only=True, shuffle_ties=True),
            seq_len=128,
            history_len=50,
            max_tokens=16,
            first_event=False,  # as on amazon3: a target is predicted from a history alone
        ),
        model=ModelConfig(
            n_layers=2,
            d_model=64,
            n_heads=2,
            n_kv_heads=2,
            d_ff=256,
            dropout=0.5,
            action=False,
            request_time=False,
            request_context=False,
        ),
        loss=LossConfig(kind="sampled_softmax", n_negatives=4096, sampling_power=0.5, scope="union"),
        optim=OptimConfig(
            learning_rate=4e-3, warmup_steps=100, ema_decay=0.99, weight_decay=1.0, decay_embeddings=True
        ),
        train=TrainConfig(steps=1000, batch_size=24, log_every=100, eval_every=200, save_every=200, n_valid=15000),
        eval=EvalConfig(mask_seen=True, selection="in_service"),
        baselines=("popularity", "item_knn", "graph_text"),
    )
