"""MovieLens 100k from RecBole's atomic files; leave-one-out.

Command: python -m experiments.train --config=configs/ml100k.py --workdir=runs/ml100k
Hardware: one CPU core.
Result: recall@10 .2047, NDCG@10 .1126 (SASRec with sampled softmax .2259, .1238); 3 minutes, and as long for each
SASRec (results/yelp_ml100k.json).
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
        name="ml100k",
        data=DataConfig(
            source="tables",
            tables=TablesConfig(
                folder="../shared/data/ml100k",
                interactions="ml-100k.inter.gz",
                items="ml-100k.item.gz",
                users="ml-100k.user.gz",
                duplicates="keep",
            ),
            schema=SchemaConfig(
                user="user_id",
                item="item_id",
                service_name="films",
                time="timestamp",
                item_id="item_id",
                text=("movie_title",),
                attributes=("class", "release_year"),
                attribute_separator=" ",
                profile=("age", "gender", "occupation"),
                profile_id="user_id",
            ),
            split=SplitConfig(kind="leave_one_out"),
            seq_len=256,
            history_len=200,
            max_tokens=12,
            max_attributes=8,
            first_event=False,  # the published protocols predict from a history alone
        ),
        model=ModelConfig(
            untrained_rows=True,  # as measured
            n_layers=2,
            d_model=64,
            d_ff=128,
            dropout=0.2,
            service=False,
            action=False,
            request_time=False,
        ),
        loss=LossConfig(kind="full_softmax"),
        optim=OptimConfig(learning_rate=2e-3),
        train=TrainConfig(steps=1200, batch_size=12, log_every=50, eval_every=100, save_every=200, patience=4),
        eval=EvalConfig(mask_seen=True),
    )
