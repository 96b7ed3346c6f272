"""Restaurants and food with titles and real times; table split.

Command: python -m experiments.train --config=configs/yelp.py --workdir=runs/yelp
Hardware: one CPU core.
Result: recall@10 .0417, NDCG@10 .0219 (item graph + texts .0291, .0145); 13 minutes (results/yelp_ml100k.json).
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
        name="yelp",
        data=DataConfig(
            source="tables",
            tables=TablesConfig(
                folder="../shared/data/yelp",
                interactions="interactions.tsv.gz",
                items="items.tsv.gz",
                duplicates="keep",
                unknown_time="keep",  # five users have no times
            ),
            schema=SchemaConfig(
                user="user",
                item="item",
                service_name="yelp",
                time="unix_ts",
                item_id="item",
                text=("title",),
                attributes=("categories",),
            ),
            split=SplitConfig(kind="leave_one_out"),
            seq_len=128,
            history_len=50,
            max_tokens=12,
            max_attributes=12,
            first_event=False,  # the published protocols predict from a history alone
        ),
        model=ModelConfig(
            untrained_rows=True,  # as measured
            n_layers=1,
            d_model=64,
            d_ff=128,
            dropout=0.5,
            service=False,
            action=False,
            request_time=False,
        ),
        loss=LossConfig(kind="sampled_softmax", n_negatives=4096),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(steps=2400, batch_size=24, log_every=100, eval_every=400, save_every=400, n_valid=10000),
        # 6.7 % of the last items repeat an earlier one; seen items are masked, so these count as misses.
        eval=EvalConfig(mask_seen=True),
        baselines=("popularity", "popularity_recent", "markov", "item_knn", "graph_text"),  # of one service
    )
