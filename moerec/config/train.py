"""Loss, optimiser, training, evaluation and audit."""

import dataclasses
import math

from moerec.config.checks import one_of, require


@dataclasses.dataclass
class LossConfig:
    """Next-item loss. `one_negative` is the classical SASRec objective (binary cross-entropy)."""

    kind: str = "full_softmax"  # full_softmax, sampled_softmax, one_negative, or one of one's own
    n_negatives: int = 4096  # shared by all slots of a step
    sampling_power: float = 0.0  # negatives are drawn with q ~ (1 + training count)^power; 0 is uniform
    scope: str = "union"  # the competitors of a target: the items of all services, or those of its own
    chunk: int = 512  # slots whose logits are in memory at once
    vocab_chunk: int = 2048  # of text: tokens of the vocabulary whose logits are, for all slots of a device
    analyser_weight: float = 0.1  # mixtures only: the analyser's cross-entropy of the next event's service
    balance_weight: float = 0.01  # load over the global batch against the load that its domains ask for
    domain_balance_weight: float = 0.01  # the same within the slots of each domain
    router_z_weight: float = 0.001  # mean square of the router's log-sum-exp
    task_weights: tuple[str, ...] = ()  # "TASK=NUMBER": what a task's mean loss is multiplied by; the others by 1

    def __post_init__(self):
        require(len(self.weight_of) == len(self.task_weights), "loss.task_weights", "a task is there twice")
        for name in ("analyser_weight", "balance_weight", "domain_balance_weight", "router_z_weight"):
            require(getattr(self, name) >= 0, f"loss.{name}", "must not be negative")
        one_of(self.scope, "loss.scope", ("union", "service"))
        require(self.n_negatives >= 1, "loss.n_negatives", "must be at least 1")
        require(-2 <= self.sampling_power <= 2, "loss.sampling_power", "must lie in [-2, 2]")
        for name in ("chunk", "vocab_chunk"):
            require(getattr(self, name) >= 1, f"loss.{name}", "must be at least 1")

    @property
    def weight_of(self) -> dict[str, float]:
        """The weights of the tasks that have one of their own."""
        return _read_numbers(self.task_weights, "loss.task_weights", '"TASK=NUMBER"')

    @property
    def by_service(self) -> bool:
        """Whether the competitors of a target are the items of its own service alone."""
        return self.scope == "service"


def _read_numbers(entries: tuple[str, ...], field: str, form: str, words: tuple[str, ...] = ()) -> dict[str, float]:
    """Name -> number of at least 0, from entries `name=number`. Args: words: that may stand for 0."""
    found = {}
    for entry in entries:
        name, _, digits = entry.rpartition("=")
        try:
            found[name] = 0.0 if digits in words else float(digits)
        except ValueError:
            found[name] = -1.0
        is_fit = bool(name) and math.isfinite(found[name]) and found[name] >= 0
        require(is_fit, field, f"{entry!r} is not of the form {form}")
    return found


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
    groups: tuple[str, ...] = ()  # "PATTERN=RATE" or "PATTERN=frozen": parameters by path, a multiple of the rate
    ema_decay: float = 0.0  # average of the parameters that is evaluated; 0 evaluates the last ones

    def __post_init__(self):
        one_of(self.schedule, "optim.schedule", ("cosine", "linear", "constant"))
        require(self.learning_rate > 0, "optim.learning_rate", "must be positive")
        require(self.warmup_steps >= 0, "optim.warmup_steps", "must not be negative")
        for name in ("ema_decay", "b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "must lie in [0, 1)")
        require(0 <= self.final_rate <= 1, "optim.final_rate", "must lie in [0, 1]")
        require(self.weight_decay >= 0, "optim.weight_decay", "must not be negative")
        require(self.clip_norm >= 0, "optim.clip_norm", "must not be negative")
        require(len(self.rates) == len(self.groups), "optim.groups", "a pattern is there twice")

    @property
    def rates(self) -> dict[str, float]:
        """Of each pattern the multiple of the learning rate; 0 is frozen."""
        return _read_numbers(self.groups, "optim.groups", '"PATTERN=RATE" or "PATTERN=frozen"', words=("frozen",))


@dataclasses.dataclass
class TrainConfig:
    steps: int = 1000
    batch_size: int = 32  # packed rows of a step, over all devices and microbatches
    n_microbatches: int = 1  # gradient accumulation
    log_every: int = 50
    eval_every: int = 200  # validation; 0 evaluates at the end only
    save_every: int = 200
    patience: int = 0  # evaluations without a better validation score before stopping; 0 never stops early
    init_from: str = ""  # the directory of a run, or of its checkpoints, whose best parameters training begins with
    init_rename: tuple[str, ...] = ()  # "THERE=HERE": beginnings of paths that are called otherwise there
    init_fresh: tuple[str, ...] = ()  # patterns of paths here that may stay as they are initialised
    init_drop: tuple[str, ...] = ()  # patterns of paths there that may be left out
    n_valid: int = 5000  # most validation targets used during training (a fixed sample)
    mesh_data: int = 1  # devices over which the batch is split
    mesh_expert: int = 1  # devices over which the batch and the experts are split
    mesh_model: int = 1  # devices over which the feed-forward width and the heads are split
    grace_s: float = 25.0  # seconds after SIGTERM for saving the state; then, or at a second one, the process ends

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
            require(getattr(self, name) >= 1, f"train.{name}", "must be at least 1")
        for name in ("eval_every", "patience", "grace_s"):
            require(getattr(self, name) >= 0, f"train.{name}", "must not be negative")
        renamed = all(there and here for there, _, here in (entry.partition("=") for entry in self.init_rename))
        require(renamed, "train.init_rename", 'entries are of the form "THERE=HERE"')
        is_used = bool(self.init_from) or not (self.init_rename or self.init_fresh or self.init_drop)
        require(is_used, "train.init_from", "init_rename, init_fresh and init_drop belong to it")
        parts = self.n_microbatches * self.mesh_data * self.mesh_expert
        wanted = "must be a multiple of n_microbatches times mesh_data times mesh_expert"
        require(self.batch_size % parts == 0, "train.batch_size", wanted)


@dataclasses.dataclass
class EvalConfig:
    mask_seen: bool = True  # items of the user's history are no candidates
    selection: str = "union"  # which NDCG@10 on validation picks the best step: union, or in_service (mean of services)
    batch_size: int = 256  # targets scored at once
    n_boot: int = 1000
    n_test: int = 0  # 0 evaluates every test target
    popularity_days: float = 0.0  # window of popularity (recent); 0: the best of several on the validation targets
    n_probed: int = 500  # targets on which parts of a model are forced and taken away; 0 leaves that out
    interventions: bool = False  # what predictions lose without own profile, own context, events in other services

    def __post_init__(self):
        one_of(self.selection, "eval.selection", ("union", "in_service"))
        for name in ("batch_size", "n_boot"):
            require(getattr(self, name) >= 1, f"eval.{name}", "must be at least 1")
        for name in ("n_test", "n_probed"):
            require(getattr(self, name) >= 0, f"eval.{name}", "must not be negative")
        require(0 <= self.popularity_days < math.inf, "eval.popularity_days", "must be 0 or a number of days")


@dataclasses.dataclass
class AuditConfig:
    """The limits of `experiments.audit`: largest values that pass, as shares in [0, 1].

    A limit of 1 is never exceeded, and the value is only reported.

    The orders and the canary of ids and the identical users must also exceed what chance gives but for a probability of
    .00135.
    """

    max_far_times: float = 0.0  # events before 1990, later than now, or far from all others: another unit, or none
    max_far_times_test: float = 0.0  # test events at such times
    max_tied_test: float = 0.1  # test events at the very time of the event before them
    max_tied_valid: float = 0.1  # the same of validation events
    max_id_order: float = 0.52  # test events whose item's id lies on one side of the id before; .5 without a defect
    max_id_order_in_ties: float = 0.52  # the same of all neighboring events of one time
    max_tie_order: float = 0.6  # neighbors of one time that stand as the same items do elsewhere; .5 without a defect
    max_id_canary: float = 0.01  # recall@5 of arithmetic on ids, above that of chance
    max_future_in_history: float = 0.0  # targets with a later event in their history
    max_future_canary: float = 0.0  # targets whose inputs change when the events after them are rewritten
    max_train_after_own_test: float = 0.0  # test events with a later training event of the same user
    max_train_after_test: float = 1.0  # training events later than a test event, mean over the test events
    max_repeats: float = 1.0  # test events whose item is in their history
    max_service_majority: float = 1.0  # accuracy of the most frequent service
    max_service_last: float = 1.0  # accuracy of the service of the event before
    max_service_markov: float = 1.0  # accuracy of the service that most often follows it
    max_unseen_items: float = 0.2  # test events whose item is not in training
    max_unseen_users: float = 1.0  # test events whose user is not in training
    max_duplicates: float = 0.01  # events that repeat an earlier one in user, item, action and time
    max_identical_users: float = 0.01  # users whose sequence in a service is also somebody else's

    def __post_init__(self):
        for field in dataclasses.fields(self):
            require(0 <= getattr(self, field.name) <= 1, f"audit.{field.name}", "must lie in [0, 1]")
