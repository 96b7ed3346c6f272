"""The full model in sizes that follow from the counts of tables, as `configs/own_data.py` has it.

Each rule is drawn through what was tuned on five data sets, apart from one another, and goes on between and beyond
them, where nothing was measured; the numbers are those of `configs/` and `results/`:

| data | events | users | items | events an item | most slots trained on |
|---|---|---|---|---|---|
| built-in world (`configs/city_asked.py`) | 160,000 | 2,000 | 1,800 | 89 | 1,000,000 |
| `configs/ml100k.py` | 100,000 | 943 | 1,682 | 59 | 3,700,000 |
| `configs/yelp.py` | 316,000 | 30,431 | 20,033 | 16 | 7,400,000 |
| `configs/amazon3_past.py` | 662,000 | 72,682 | 42,382 | 16 | 600,000 |
| `configs/amazon6_half.py` | 188,000 | 5,379 | 55,035 | 3 | 900,000 |
"""

import dataclasses

from moerec.config import (
    AskConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PersonalConfig,
    TrainConfig,
)
from moerec.errors import InputError

FEW_EVENTS = 5_000  # narrower below, where 64 wide states have more numbers than there are events to learn them from
MANY_EVENTS = 5_000_000  # twice as wide from here on, with one more layer in the trunk; beyond all that was measured
DENSE, HALF_DENSE = 64, 32  # events an item: the built-in world and MovieLens lie about them, the other three below
SPARSE = 8  # events an item: amazon6_half, where 39 % of the targets are untrained items, lies below
MOST_IN_FULL = 10_000  # items that every softmax goes over; the tuned configs sample from 20,000 on, not at 1,800
MOST_ASKED = 64  # services that are asked one by one; 12 were measured
FEW_OF_A_SERVICE = 20_000  # events of a service, the mean: with 13,000 in each of 12, experts of their own did harm
FEW_ITEMS = 100  # too few for tables of 64 neighbors to choose any
N_NEIGHBORS = 64
SLOTS_TO_SEE = (
    1_000_000  # of training, where that is 2 to 6 passes over the events; the first and the last two of the table
)
PASSES = (2, 6)
FEWEST_STEPS = 200  # half of them go to the warm-up and the average of the parameters
SCORES_AT_ONCE = 1 << 25  # 128 MiB of them
MOST_TESTED = 20_000  # targets: the standard error of recall is then below .0036


@dataclasses.dataclass(frozen=True)
class TableCounts:
    """What the sizes follow from; `moerec.data.prepare.tables.counts` counts it.

    Attributes:
      n_users, n_events, n_services: of the interactions.
      n_items: of the table of items, or else of the interactions.
      long_history: events that 95 users of 100 have at most.
    """

    n_users: int
    n_events: int
    n_items: int
    n_services: int
    long_history: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"data.tables: {field.name} is {getattr(self, field.name)}; at least 1 is needed")

    @property
    def n_slots(self) -> int:
        """Of one pass: every event, and each user's control slot."""
        return self.n_events + self.n_users

    @property
    def events_per_item(self) -> float:
        return self.n_events / self.n_items


def size_config(data: DataConfig, counts: TableCounts, *, mask_seen: bool) -> Config:
    """The full model for tables: every service asked, domain experts, a profile over all services, and pointers.

    What the tables lack is left out: one service is not asked and has no experts, what has no text has no pointer to
    similar ones, and the like for times, contexts and actions. With `mask_seen` nothing points into the history, whose
    items are no candidates then.

    Args:
      data: the tables with their columns; its sizes are replaced.
      counts: of these tables.
      mask_seen: `eval.mask_seen`, whether items that a user had are no candidates.
    """
    data = _size_data(data, counts)
    model = _size_model(data, counts, mask_seen)
    train = _size_training(data, counts)
    # Sampled as in configs/amazon3.py: 4,096 negatives that all slots of a step share, half by popularity.
    in_full = counts.n_items <= MOST_IN_FULL
    loss = LossConfig() if in_full else LossConfig(kind="sampled_softmax", n_negatives=4096, sampling_power=0.5)
    at_once = _power_of_two(SCORES_AT_ONCE // counts.n_items, 16, 256)
    n_test = MOST_TESTED if counts.n_users > MOST_TESTED else 0
    evaluation = EvalConfig(mask_seen=mask_seen, batch_size=at_once, n_test=n_test)
    optim = _size_optimiser(counts, train.steps)
    return Config(data=data, model=model, loss=loss, optim=optim, train=train, eval=evaluation)


def _size_data(data: DataConfig, counts: TableCounts) -> DataConfig:
    """Histories of 32 to 256 events, which hold all that 95 users of 100 have, in rows of at least 128 slots."""
    history_len = _power_of_two(2 * counts.long_history - 1, 32, 256)  # the next power of two
    is_large, has_text = counts.n_items >= FEW_ITEMS, _has_text(data)
    return dataclasses.replace(
        data,
        history_len=history_len,
        seq_len=max(128, history_len),
        text_neighbors=N_NEIGHBORS if is_large and has_text else 0,
        transition_neighbors=N_NEIGHBORS if is_large else 0,
        crossing_neighbors=N_NEIGHBORS if is_large and counts.n_services > 1 else 0,
    )


def _size_model(data: DataConfig, counts: TableCounts, mask_seen: bool) -> ModelConfig:
    """Tuned models with pointers are 64 wide with two layers: a trunk of one, and one that is asked and personal."""
    schema, is_asked = data.schema, 1 < counts.n_services <= MOST_ASKED
    width = 32 if counts.n_events < FEW_EVENTS else 64 if counts.n_events < MANY_EVENTS else 128
    n_layers = 2 if counts.n_events < MANY_EVENTS else 3
    upper = n_layers - 1
    # As configs/city_asked.py; where services are small, more of the same active width is what all share.
    d_expert = width // 4 if counts.n_events < FEW_OF_A_SERVICE * counts.n_services else 3 * width // 4
    moe = MoEConfig(
        layers=(upper,), n_per_group=1, n_active=2, d_expert=d_expert, d_shared=9 * width // 4 - 2 * d_expert,
        bias_rate=0.0,
    )  # fmt: skip
    # The less an item has been seen, the more its row is noise: without one it is met as its text.
    row_dropout = 0.0 if not _has_text(data) else 0.3 if counts.events_per_item < SPARSE else 0.2
    return ModelConfig(
        n_layers=n_layers,
        d_model=width,
        n_heads=max(2, width // 32),
        n_kv_heads=max(2, width // 32),
        d_head=min(32, width // 2),
        d_ff=9 * width // 4,
        d_text=width,
        dropout=_by_density(counts, 0.1, 0.2, 0.5),
        item_text=_has_text(data),
        service=counts.n_services > 1,
        action=bool(schema.action),
        event_time=bool(schema.time),
        request_time=bool(schema.time),
        request_context=bool(schema.context),
        repeat_bias=not mask_seen,
        pointer="none" if mask_seen else "services" if is_asked else "all",
        text_pointer=data.text_neighbors > 0,
        transition_pointer=data.transition_neighbors > 0,
        crossing_pointer=data.crossing_neighbors > 0,
        row_dropout=row_dropout,
        moe=moe if is_asked else MoEConfig(),
        ask=AskConfig(from_layer=upper, d_analyser=width // 2) if is_asked else AskConfig(),
        personal=PersonalConfig(layers=(upper,), d_memory=width // 2),
    )


def _size_training(data: DataConfig, counts: TableCounts) -> TrainConfig:
    """About a million slots, in steps of 1,024 to 4,096 (2,048 with the 162,000 slots of the built-in world)."""
    batch_size = _power_of_two(counts.n_slots // 64, 1024, 4096) // data.seq_len
    fewest, most = (passes * counts.n_slots for passes in PASSES)
    n_slots = max(fewest, min(most, SLOTS_TO_SEE))
    steps = max(FEWEST_STEPS, round(n_slots / (batch_size * data.seq_len)))
    return TrainConfig(
        steps=steps,
        batch_size=batch_size,
        log_every=max(1, steps // 20),
        eval_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        n_valid=min(counts.n_users, 5000),
    )


def _size_optimiser(counts: TableCounts, steps: int) -> OptimConfig:
    """Where items are seldom seen: a slower rate, and weight decay of embeddings too, as the Amazon configs have it."""
    return OptimConfig(
        learning_rate=_by_density(counts, 4e-3, 2e-3, 2e-3),
        weight_decay=_by_density(counts, 0.1, 0.1, 1.0),
        decay_embeddings=_by_density(counts, False, False, True),
        warmup_steps=min(100, steps // 4),
        ema_decay=round(min(max(1 - 6 / steps, 0.98), 0.998), 4),  # over a sixth of the steps
    )


def _has_text(data: DataConfig) -> bool:
    """Whether items have words: texts, attributes, or ranges of numbers."""
    schema = data.schema
    return bool(schema.text or schema.attributes or schema.item_numbers)


def _by_density(counts: TableCounts, dense, half_dense, sparse):
    """One of three, by the events of an item."""
    if counts.events_per_item >= DENSE:
        return dense
    return half_dense if counts.events_per_item >= HALF_DENSE else sparse


def _power_of_two(n: int, least: int, most: int) -> int:
    """The largest power of two that is no more than `n`, within the limits, which are powers of two."""
    return min(max(1 << max(n, 1).bit_length() - 1, least), most)
