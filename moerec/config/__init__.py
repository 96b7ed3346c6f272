"""Typed configuration. Every class checks itself on construction; `checked` re-checks after command-line overrides.

The classes are not frozen only because `ml_collections.config_flags` sets fields in place; nothing of ours may.
"""

import dataclasses

from moerec.errors import InputError


def _require(condition: bool, field: str, rule: str):
    if not condition:
        raise InputError(f"config.{field}: {rule}")


def _require_seed(value: int, field: str):
    if isinstance(value, int):  # another type is named by who reads the config
        _require(0 <= value < 2**32, field, "must lie in [0, 2^32)")


def _one_of(value: str, field: str, allowed: tuple[str, ...]):
    _require(value in allowed, field, f"{value!r} is none of {', '.join(allowed)}")


@dataclasses.dataclass
class CityConfig:
    """The built-in world (`moerec.data.city`). Knobs at zero switch an effect off entirely."""

    n_people: int = 2000
    events_per_person: float = 80.0  # mean of the number of events
    items_per_service: int = 600
    n_types: int = 8  # taste types, each shared over services with probability `rho` or private to a service
    n_needs: int = 12  # discrete needs
    rho: float = 0.7  # probability that a person's type in a service is their shared one
    kappa: float = 1.0  # strength of hour, weekday, season, weather and holiday on the needs' transitions
    tau: float = 1.0  # recency: how much the needs drift, and how much the last need matters for the next
    habit: float = 1.0  # strength of brand loyalty and of buying (or, a durable, not buying) the very same item again
    identical_people: bool = False
    identical_services: bool = False
    profile_missing_rate: float = 0.3
    profile_noise_rate: float = 0.15

    def __post_init__(self):
        for name in ("n_people", "items_per_service", "n_types", "n_needs"):
            _require(getattr(self, name) >= 1, f"data.city.{name}", "must be at least 1")
        _require(self.events_per_person >= 3, "data.city.events_per_person", "must be at least 3")
        for name in ("rho", "profile_missing_rate", "profile_noise_rate"):
            _require(0 <= getattr(self, name) <= 1, f"data.city.{name}", "must lie in [0, 1]")
        for name in ("kappa", "tau", "habit"):
            _require(0 <= getattr(self, name) <= 10, f"data.city.{name}", "must lie in [0, 10]")


@dataclasses.dataclass
class SchemaConfig:
    """Maps the columns of the tables. An empty name means that the tables have no such column."""

    user: str = "user"
    item: str = "item"
    service: str = ""  # column in both tables; without it there is the one service `service_name`
    service_name: str = "items"
    action: str = ""
    time: str = ""
    time_unit: str = "s"  # s, ms, day or iso
    context: tuple[str, ...] = ()
    item_id: str = "item"  # columns of the item table
    item_service: str = ""
    text: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()  # columns of category-like values, each a list separated by `attribute_separator`
    attribute_separator: str = ","
    profile: tuple[str, ...] = ()  # columns of the user table
    profile_id: str = "user"

    def __post_init__(self):
        _require(bool(self.user), "data.schema.user", "a column is needed")
        _require(bool(self.item), "data.schema.item", "a column is needed")
        _one_of(self.time_unit, "data.schema.time_unit", ("s", "ms", "day", "iso"))
        _require(bool(self.service) or bool(self.service_name), "data.schema.service_name", "must not be empty")
        _require(self.service_name != "all", "data.schema.service_name", '"all" is the sum of the services')


@dataclasses.dataclass
class TablesConfig:
    """Where the tables are. `folder` is relative to the current directory."""

    folder: str = ""
    interactions: str = "interactions.tsv.gz"
    items: str = ""  # without it the catalogue is the items of the interactions
    users: str = ""
    format: str = "auto"  # auto (by the file's ending), tsv, csv, parquet, atomic
    on_bad_rows: str = "error"  # error or quarantine
    duplicates: str = "refuse"  # the same person, item, action and time twice: refuse (a defect) or keep
    unknown_time: str = "refuse"  # an empty time: refuse (a defect) or keep (as unknown, in its published place)

    def __post_init__(self):
        _one_of(self.format, "data.tables.format", ("auto", "tsv", "csv", "parquet", "atomic"))
        _one_of(self.on_bad_rows, "data.tables.on_bad_rows", ("error", "quarantine"))
        _one_of(self.duplicates, "data.tables.duplicates", ("refuse", "keep"))
        _one_of(self.unknown_time, "data.tables.unknown_time", ("refuse", "keep"))


@dataclasses.dataclass
class SplitConfig:
    """Which events are trained on, validated on and tested on."""

    kind: str = "leave_one_out"  # leave_one_out, time or person
    per_service: bool = False  # leave_one_out: the last two of each person *and service*
    valid_from: str = ""  # time: ISO dates (UTC)
    test_from: str = ""
    person_fraction: float = 0.1  # person: share of people held out for validation, and as many for the test
    shuffle_ties: bool = False  # order equal times of a person at random instead of as published

    def __post_init__(self):
        _one_of(self.kind, "data.split.kind", ("leave_one_out", "time", "person"))
        _require(0 < self.person_fraction < 0.5, "data.split.person_fraction", "must lie in (0, .5)")
        if self.kind == "time":
            _require(bool(self.valid_from and self.test_from), "data.split.valid_from", "a time split needs both dates")


@dataclasses.dataclass
class DataConfig:
    source: str = "city"  # city, tables, or prepared (a folder that experiments.prepare wrote)
    prepared: str = ""
    city: CityConfig = dataclasses.field(default_factory=CityConfig)
    tables: TablesConfig = dataclasses.field(default_factory=TablesConfig)
    schema: SchemaConfig = dataclasses.field(default_factory=SchemaConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    seed: int = 0  # the city, the permutation of item ids, the split by person
    seq_len: int = 128  # slots of a packed row
    history_len: int = 128  # most slots of one person's sequence that a prediction sees
    reader: str = "memory"  # training events from memory, or from the shards as they are needed
    n_shards: int = 4  # ArrayRecord files of a prepared folder
    max_tokens: int = 24  # text and attribute tokens of an item
    vocab_size: int = 20000  # most text tokens kept

    def __post_init__(self):
        _one_of(self.source, "data.source", ("city", "tables", "prepared"))
        _one_of(self.reader, "data.reader", ("memory", "shards"))
        shuffled_shards = self.reader == "shards" and self.split.shuffle_ties
        _require(not shuffled_shards, "data.reader", "shards keep the published order; split.shuffle_ties needs memory")
        if self.source == "tables":
            _require(bool(self.tables.folder), "data.tables.folder", "the folder of the tables is needed")
        if self.source == "prepared":
            _require(bool(self.prepared), "data.prepared", "the prepared folder is needed")
        _require_seed(self.seed, "data.seed")
        _require(1 <= self.history_len <= self.seq_len, "data.history_len", "must lie in [1, data.seq_len]")
        for name in ("n_shards", "max_tokens", "vocab_size"):
            _require(getattr(self, name) >= 1, f"data.{name}", "must be at least 1")


@dataclasses.dataclass
class MoEConfig:
    """Mixtures of domain experts: a group of experts for each service, and one across all of them.

    Without `layers` the model is dense, and nothing else here counts.
    """

    layers: tuple[int, ...] = ()  # which layers are mixtures, from 0; the dense ones before them are the trunk
    n_per_group: int = 2  # experts of a group; with `d_expert` the granularity
    d_expert: int = 128  # width of an expert
    n_active: int = 2  # experts that a slot goes to
    d_shared: int = 0  # width of an expert that sees every slot; 0 is none
    n_open_groups: int = 0  # most probable services whose groups a slot may use, beside the cross group; 0 is all
    capacity_factor: float = 0.0  # in training, most slots of an expert, a multiple of its even share; 0: no limit
    jitter_rate: float = 0.0  # noise on what the router sees in training: times 1 - rate to 1 + rate
    home_share: float = 0.6  # of a domain's slots, the share that balance asks of its own group
    cross_share: float = 0.25  # and of the cross group; the other services' groups share what is left
    bias_rate: float = 0.001  # step of the bias that steers the choice to the asked load without a loss; 0 is none
    tile: int = 64  # rows of a tile of the grouped matmuls
    backend: str = "auto"  # of router and experts: by the platform compiled for, or one by name
    strategy: str = "ring"  # over several devices: ring, all_to_all, or ragged_all_to_all (not on a CPU)
    send_factor: float = 0.0  # most rows from one device to another, a multiple of the even share; 0: no limit
    receive_factor: float = 0.0  # most rows that a device takes, a multiple of the even share; 0: no limit

    def __post_init__(self):
        _require(len(set(self.layers)) == len(self.layers), "model.moe.layers", "a layer is named twice")
        for name in ("n_per_group", "d_expert", "n_active", "tile"):
            _require(getattr(self, name) >= 1, f"model.moe.{name}", "must be at least 1")
        for name in ("d_shared", "n_open_groups", "capacity_factor", "bias_rate", "send_factor", "receive_factor"):
            _require(getattr(self, name) >= 0, f"model.moe.{name}", "must not be negative")
        _one_of(self.backend, "model.moe.backend", ("auto", "xla_tiles", "ragged_dot", "pallas_tpu"))
        _one_of(self.strategy, "model.moe.strategy", ("ring", "all_to_all", "ragged_all_to_all"))
        _require(0 <= self.jitter_rate < 1, "model.moe.jitter_rate", "must lie in [0, 1)")
        # What is asked of the other groups is divided by: next to nothing would make their slots cost without bound.
        shares = self.home_share > 0 and self.cross_share > 0 and self.home_share + self.cross_share <= 0.99
        _require(shares, "model.moe.home_share", "it and cross_share must be positive and add up to at most .99")


@dataclasses.dataclass
class ModelConfig:
    """The Qwen2-shaped decoder over slots, and which parts of an event it reads (each a switch, for ablations)."""

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 2
    n_kv_heads: int = 2
    d_head: int = 32
    d_ff: int = 256
    d_text: int = 64  # width of the item text encoder's token embeddings
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dropout: float = 0.2  # on the event vectors and after each sublayer
    item_row: bool = True  # the item's own embedding
    item_text: bool = True  # the projected text and attribute tokens
    service: bool = True
    action: bool = True
    event_time: bool = False  # hour, weekday, season of the event, and the gap to the event before it
    request_time: bool = True  # the same of the next request, which is known when the prediction is asked for
    request_context: bool = True  # context features of the next request
    tie_items: bool = True  # the item head scores against the vectors that the input uses
    item_bias: bool = True
    compute_dtype: str = "float32"  # or bfloat16; parameters stay float32
    remat: bool = False
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_text"):
            _require(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        _require(self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", "must divide model.n_heads")
        _require(self.d_head % 2 == 0, "model.d_head", "must be even (rotary embeddings turn pairs)")
        _require(0 <= self.dropout < 1, "model.dropout", "must lie in [0, 1)")
        _require(self.norm_eps > 0, "model.norm_eps", "must be positive")
        _require(self.rope_theta > 1, "model.rope_theta", "must be above 1")
        _require(self.item_row or self.item_text, "model.item_row", "an event needs the item's row or its text")
        _one_of(self.compute_dtype, "model.compute_dtype", ("float32", "bfloat16"))
        outside = [layer for layer in self.moe.layers if not 0 <= layer < self.n_layers]
        _require(not outside, "model.moe.layers", f"{outside} of {self.n_layers} layers (from 0)")


@dataclasses.dataclass
class LossConfig:
    """Next-item loss. `one_negative` is the classical SASRec objective (binary cross-entropy)."""

    kind: str = "full_softmax"  # full_softmax, sampled_softmax or one_negative
    n_negatives: int = 4096  # shared by all slots of a step
    sampling_power: float = 0.0  # negatives are drawn with q ~ (1 + training count)^power; 0 is uniform
    scope: str = "union"  # the competitors of a target: the items of all services, or those of its own
    chunk: int = 512  # slots whose logits are in memory at once
    analyser_weight: float = 0.1  # mixtures only: the analyser's cross-entropy of the next event's service
    balance_weight: float = 0.01  # load over the global batch against the load that its domains ask for
    domain_balance_weight: float = 0.01  # the same within the slots of each domain
    router_z_weight: float = 0.001  # mean square of the router's log-sum-exp

    def __post_init__(self):
        for name in ("analyser_weight", "balance_weight", "domain_balance_weight", "router_z_weight"):
            _require(getattr(self, name) >= 0, f"loss.{name}", "must not be negative")
        _one_of(self.kind, "loss.kind", ("full_softmax", "sampled_softmax", "one_negative"))
        _one_of(self.scope, "loss.scope", ("union", "service"))
        _require(self.n_negatives >= 1, "loss.n_negatives", "must be at least 1")
        _require(-2 <= self.sampling_power <= 2, "loss.sampling_power", "must lie in [-2, 2]")
        _require(self.chunk >= 1, "loss.chunk", "must be at least 1")


@dataclasses.dataclass
class OptimConfig:
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine, linear or constant, after the warm-up
    final_rate: float = 0.1  # share of the learning rate that is left at the end
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.01  # on matrices only
    decay_embeddings: bool = False  # decay the embedding tables, too
    clip_norm: float = 1.0  # 0 switches clipping off
    ema_decay: float = 0.0  # average of the parameters that is evaluated; 0 evaluates the last ones

    def __post_init__(self):
        _one_of(self.schedule, "optim.schedule", ("cosine", "linear", "constant"))
        _require(self.learning_rate > 0, "optim.learning_rate", "must be positive")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", "must not be negative")
        for name in ("ema_decay", "b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", "must lie in [0, 1)")
        _require(0 <= self.final_rate <= 1, "optim.final_rate", "must lie in [0, 1]")
        _require(self.weight_decay >= 0, "optim.weight_decay", "must not be negative")
        _require(self.clip_norm >= 0, "optim.clip_norm", "must not be negative")


@dataclasses.dataclass
class TrainConfig:
    steps: int = 1000
    batch_size: int = 32  # packed rows of a step, over all devices and microbatches
    n_microbatches: int = 1  # gradient accumulation
    log_every: int = 50
    eval_every: int = 200  # validation; 0 evaluates at the end only
    save_every: int = 200
    patience: int = 0  # evaluations without a better validation score before stopping; 0 never stops early
    n_valid: int = 5000  # most validation targets used during training (a fixed sample)
    mesh_data: int = 1  # devices over which the batch is split
    mesh_expert: int = 1  # devices over which the batch and the experts are split
    mesh_model: int = 1  # devices over which the feed-forward width and the heads are split

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "n_microbatches",
            "log_every",
            "save_every",
            "n_valid",
            "mesh_data",
            "mesh_expert",
            "mesh_model",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("eval_every", "patience"):
            _require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        parts = self.n_microbatches * self.mesh_data * self.mesh_expert
        wanted = "must be a multiple of n_microbatches times mesh_data times mesh_expert"
        _require(self.batch_size % parts == 0, "train.batch_size", wanted)


@dataclasses.dataclass
class EvalConfig:
    mask_seen: bool = True  # items of the person's history are no candidates
    selection: str = "union"  # which NDCG@10 on validation picks the best step: union, or in_service (mean of services)
    batch_size: int = 256  # targets scored at once
    n_boot: int = 1000
    n_test: int = 0  # 0 evaluates every test target

    def __post_init__(self):
        _one_of(self.selection, "eval.selection", ("union", "in_service"))
        for name in ("batch_size", "n_boot"):
            _require(getattr(self, name) >= 1, f"eval.{name}", "must be at least 1")
        _require(self.n_test >= 0, "eval.n_test", "must not be negative")


@dataclasses.dataclass
class AuditConfig:
    """The limits of `experiments.audit`: largest values that pass, as shares in [0, 1].

    A limit of 1 is never exceeded, and the value is only reported.

    The orders and the canary of ids must exceed theirs by three standard errors of chance.
    """

    max_tied_test: float = 0.1  # test events at the very time of the event before them
    max_tied_valid: float = 0.1  # the same of validation events
    max_id_order: float = 0.52  # test events whose item's id lies on one side of the id before; .5 without a defect
    max_id_order_in_ties: float = 0.52  # the same of all neighbouring events of one time
    max_tie_order: float = 0.6  # neighbours of one time that stand as the same items do elsewhere; .5 without a defect
    max_id_canary: float = 0.01  # recall@5 of arithmetic on ids, above that of chance
    max_future_in_history: float = 0.0  # targets with a later event in their history
    max_future_canary: float = 0.0  # targets whose inputs change when the events after them are rewritten
    max_train_after_own_test: float = 0.0  # test events with a later training event of the same person
    max_train_after_test: float = 1.0  # training events later than a test event, mean over the test events
    max_repeats: float = 1.0  # test events whose item is in their history
    max_service_majority: float = 1.0  # accuracy of the most frequent service
    max_service_last: float = 1.0  # accuracy of the service of the event before
    max_service_markov: float = 1.0  # accuracy of the service that most often follows it
    max_unseen_items: float = 0.2  # test events whose item is not in training
    max_unseen_people: float = 1.0  # test events whose person is not in training
    max_duplicates: float = 0.01  # events that repeat an earlier one in person, item, action and time
    max_identical_people: float = 0.01  # people whose sequence in a service is also somebody else's

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _require(0 <= getattr(self, field.name) <= 1, f"audit.{field.name}", "must lie in [0, 1]")


BASELINES = (
    "popularity",
    "popularity_by_service",
    "popularity_recent",
    "markov",
    "item_knn",
    "item_knn_cross",
    "sasrec_one_negative",
    "sasrec_sampled",
)


@dataclasses.dataclass
class Config:
    name: str = "moerec"
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    audit: AuditConfig = dataclasses.field(default_factory=AuditConfig)
    baselines: tuple[str, ...] = BASELINES

    def __post_init__(self):
        _require_seed(self.seed, "seed")
        for name in self.baselines:
            _one_of(name, "baselines", BASELINES)


def checked(config):
    """The same configuration, built anew so that every check sees the overridden values."""
    fields = {
        field.name: checked(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }
    return type(config)(**fields)
