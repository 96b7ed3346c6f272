"""The shape of the model, and which of its parts are switched on."""

import dataclasses

from moerec.config.checks import one_of, require


@dataclasses.dataclass
class MoEConfig:
    """Mixtures of domain experts: a group of experts for each service, and one across all of them.

    Without `layers` the model is dense, and nothing else here counts.
    """

    layers: tuple[int, ...] = ()  # which layers are mixtures, from 0; the dense ones before them are the trunk
    services: bool = True  # whether each service has a group; without, all experts are of the one across all
    n_per_group: int = 2  # experts of a group; with `d_expert` the granularity
    d_expert: int = 128  # width of an expert
    n_active: int = 2  # experts that a slot goes to
    cross: bool = True  # whether there is a group across all services
    renormalise: bool = True  # whether the weights of the experts chosen add up to one; else they are their softmax
    reads_domain: bool = True  # whether the routers read the analyser's posterior
    d_shared: int = 0  # width of an expert that sees every slot; 0 is none
    shared_gate: bool = False  # whether a sigmoid of the state weighs the expert that sees every slot
    n_open_groups: int = 0  # most probable services whose groups a slot may use, beside the cross group; 0 is all
    capacity_factor: float = 0.0  # in training, most slots of an expert, a multiple of its even share; 0: no limit
    jitter_rate: float = 0.0  # noise on what the router sees in training: times 1 - rate to 1 + rate
    own_group_fraction: float = 0.6  # of a domain's slots, the share that balance asks of its own group
    cross_group_fraction: float = 0.25  # and of the cross group; the other services' groups share what is left
    bias_rate: float = 0.001  # step of the bias that steers the choice to the asked load without a loss; 0 is none
    tile: int = 64  # rows of a tile of the grouped matmuls
    backend: str = "auto"  # of router and experts: by the platform compiled for, or one by name
    strategy: str = "all_gather"  # over several devices: all_gather, all_to_all, or ragged_all_to_all (not on a CPU)
    send_factor: float = 0.0  # most rows from one device to another, a multiple of the even share; 0: no limit
    receive_factor: float = 0.0  # most rows that a device takes, a multiple of the even share; 0: no limit

    def __post_init__(self):
        require(len(set(self.layers)) == len(self.layers), "model.moe.layers", "a layer is named twice")
        for name in ("n_per_group", "d_expert", "n_active", "tile"):
            require(getattr(self, name) >= 1, f"model.moe.{name}", "must be at least 1")
        for name in ("d_shared", "n_open_groups", "capacity_factor", "bias_rate", "send_factor", "receive_factor"):
            require(getattr(self, name) >= 0, f"model.moe.{name}", "must not be negative")
        one_of(self.backend, "model.moe.backend", ("auto", "xla_tiles", "ragged_dot", "tokamax", "pallas_tpu"))
        one_of(self.strategy, "model.moe.strategy", ("all_gather", "all_to_all", "ragged_all_to_all"))
        require(self.services or self.cross, "model.moe.services", "needs model.moe.cross, or there is no group")
        is_whole = self.services or not self.n_open_groups
        require(is_whole, "model.moe.n_open_groups", "must be 0 where no service has a group (model.moe.services)")
        require(self.d_shared > 0 or not self.shared_gate, "model.moe.shared_gate", "needs model.moe.d_shared")
        require(0 <= self.jitter_rate < 1, "model.moe.jitter_rate", "must lie in [0, 1)")
        # What is asked of the other groups is divided by: next to nothing would make their slots cost without bound.
        shares = (
            self.own_group_fraction > 0
            and self.cross_group_fraction > 0
            and self.own_group_fraction + self.cross_group_fraction <= 0.99
        )
        require(
            shares,
            "model.moe.own_group_fraction",
            "it and cross_group_fraction must be positive and add up to at most .99",
        )


@dataclasses.dataclass
class TimeConfig:
    """How times of events and requests are embedded, where `event_time` and `request_time` switch them on."""

    kind: str = "table"  # of the calendar's features: a learned table of codes each, or fourier: a learned mix of waves
    hour: bool = True
    weekday: bool = True
    month_day: bool = False
    season: bool = True
    gap: bool = True  # since the last event, in log buckets
    service_gap: bool = False  # since the last event in the same service; before a request since that in each service

    def __post_init__(self):
        one_of(self.kind, "model.time.kind", ("table", "fourier"))

    @property
    def calendar(self) -> tuple[str, ...]:
        """The features of the calendar that are on."""
        return tuple(name for name in ("hour", "weekday", "month_day", "season") if getattr(self, name))


@dataclasses.dataclass
class PersonalConfig:
    """The unified profile of a user, and the layers whose attention it conditions.

    Without `layers` nothing is personal, and nothing else here counts.
    """

    layers: tuple[int, ...] = ()  # which layers are personal, from 0; none before the first mixture, if there is one
    memory: str = "ema"  # null, ema, delta or low_rank, or one of one's own: what is kept of a user's events
    n_aspects: int = 8  # a memory slot for each aspect and time scale
    n_scales: int = 2  # half-lives between an hour and a year, learned
    d_memory: int = 32  # width of a memory slot
    rank: int = 4  # of a low_rank memory
    chunk: int = 16  # slots of a chunk of the training pass over a memory; short ones suit CPUs
    fields: bool = True  # the static profile fields, as one more slot
    read: bool = True  # what the profile router reads is added to the states
    prefix: bool = True  # memory slots are extra keys and values
    query_scale: bool = True  # queries are scaled by the profile
    time_bias: bool = True  # attention bias of the time between two events
    pair_bias: bool = True  # attention bias of each ordered pair of services, gated by the profile
    other_services: bool = True  # a slot attends to the events of other services, too
    route: bool = True  # the aspects' relevance biases the routers of the experts

    def __post_init__(self):
        require(len(set(self.layers)) == len(self.layers), "model.personal.layers", "a layer is named twice")
        for name in ("n_aspects", "n_scales", "d_memory", "rank", "chunk"):
            require(getattr(self, name) >= 1, f"model.personal.{name}", "must be at least 1")


@dataclasses.dataclass
class AskConfig:
    """Every service asked: the layers above the analyser run under the hypothesis of each service that it is wanted.

    With `from_layer` 0 nothing is asked, and nothing else here counts.
    """

    from_layer: int = 0  # the layers from here on are asked; those below are the trunk
    analyser_layers: int = 1  # dense layers that the analyser has of its own above the trunk
    d_analyser: int = 64  # their feed-forward width

    def __post_init__(self):
        for name in ("from_layer", "analyser_layers"):
            require(getattr(self, name) >= 0, f"model.ask.{name}", "must not be negative")
        require(self.d_analyser >= 1, "model.ask.d_analyser", "must be at least 1")


@dataclasses.dataclass
class TextConfig:
    """Words in the stream. With `vocab_size` 0 there are none, and nothing else here counts."""

    vocab_size: int = 0  # rows of the tokens' embedding, V
    tie_head: bool = True  # the text head scores against the tokens' embedding

    def __post_init__(self):
        require(self.vocab_size >= 0, "model.text.vocab_size", "must not be negative")


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
    qkv_bias: bool = True  # biases of queries, keys and values, as in Qwen2; Llama has none
    dropout: float = 0.2  # on the event vectors and after each sublayer
    item_row: bool = True  # the item's own embedding
    item_text: bool = True  # the projected text and attribute tokens
    item_states: bool = False  # the projected states of the item's text by a language model; see `data.item_states`
    service: bool = True
    action: bool = True
    event_time: bool = False  # the event's place in the calendar, and the gap to the event before it; see `time`
    request_time: bool = True  # the same of the next request, which is known when the prediction is asked for
    request_context: bool = True  # context features of the next request
    context_dropout: float = 0.0  # in training, the share of context features that are hidden, as missing or as unseen
    tie_items: bool = True  # the item head scores against the vectors that the input uses
    item_bias: bool = True
    repeat_bias: bool = False  # the softmax knows the items of the history: a bias of each service for its own
    compute_dtype: str = "float32"  # or bfloat16; parameters stay float32
    remat: bool = False
    pointer: str = (
        "none"  # pointers into the user's history: none, all (over all of it), or services (and one for each)
    )
    d_pointer: int = 32  # width of a pointer's queries and keys
    pointer_time_bias: bool = False  # asked services' pointers know how long ago an event was
    text_pointer: bool = False  # one more, to the items whose texts resemble an event's; see `data.text_neighbors`
    transition_pointer: bool = (
        False  # to those that stand near it in others' histories; see `data.transition_neighbors`
    )
    crossing_pointer: bool = False  # to those of other services that do so; see `data.crossing_neighbors`
    untrained_rows: bool = False  # items without a training event have rows and biases, and are negatives
    row_dropout: float = 0.0  # in training, the share of the items that are without row and bias, drawn each step
    group_starts: tuple[int, ...] = ()  # layers at which a new group begins, beside those where their kind changes
    window: int = 0  # slots that a slot attends to at most, itself among them; 0 is all
    attention: str = "auto"  # or reference, xla_blocks, splash, cudnn: what computes it where it has no biases
    time: TimeConfig = dataclasses.field(default_factory=TimeConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    personal: PersonalConfig = dataclasses.field(default_factory=PersonalConfig)
    ask: AskConfig = dataclasses.field(default_factory=AskConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_text", "d_pointer"):
            require(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        require(self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", "must divide model.n_heads")
        for name in ("d_head", "d_pointer"):
            require(getattr(self, name) % 2 == 0, f"model.{name}", "must be even (rotary embeddings turn pairs)")
        for name in ("dropout", "context_dropout", "row_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", "must lie in [0, 1)")
        require(self.norm_eps > 0, "model.norm_eps", "must be positive")
        require(self.rope_theta > 1, "model.rope_theta", "must be above 1")
        has_item = self.item_row or self.item_text or self.item_states
        require(has_item, "model.item_row", "an event needs the item's row or its text")
        one_of(self.compute_dtype, "model.compute_dtype", ("float32", "bfloat16"))
        one_of(self.pointer, "model.pointer", ("none", "all", "services"))
        one_of(self.attention, "model.attention", ("auto", "reference", "xla_blocks", "splash", "cudnn"))
        if self.attention == "cudnn":
            require(self.compute_dtype == "bfloat16", "model.attention", "cudnn needs model.compute_dtype='bfloat16'")
            fits = self.d_head % 8 == 0 and self.d_head <= 128
            require(fits, "model.attention", "cudnn needs a model.d_head of a multiple of 8 up to 128")
        require(self.window >= 0, "model.window", "must not be negative")
        require(not self.pointer_time_bias or self.is_asked, "model.pointer_time_bias", "needs model.ask.from_layer")
        require(not self.pointer_time_bias or self.has_pointers, "model.pointer_time_bias", "needs pointers")
        is_limited = self.is_asked and self.moe.n_open_groups
        require(not is_limited, "model.moe.n_open_groups", "must be 0 where services are asked (own group and cross)")
        outside = [layer for layer in self.group_starts if not 0 < layer < self.n_layers]
        require(not outside, "model.group_starts", f"{outside} of {self.n_layers} layers (from 1)")
        for name in ("moe", "personal"):
            outside = [layer for layer in getattr(self, name).layers if not 0 <= layer < self.n_layers]
            require(not outside, f"model.{name}.layers", f"{outside} of {self.n_layers} layers (from 0)")
        is_above = self.ask.from_layer < self.n_layers
        require(is_above, "model.ask.from_layer", f"must be below model.n_layers, which is {self.n_layers}")
        has_domains = self.moe.services or not self.is_asked or not self.moe.layers
        require(has_domains, "model.moe.services", "services that are asked open groups of their own")
        n_open, opened = (1 + self.moe.cross) * self.moe.n_per_group, "own group" + " and cross" * self.moe.cross
        is_open = not (self.is_asked and self.moe.layers) or self.moe.n_active <= n_open
        require(is_open, "model.moe.n_active", f"a service that is asked opens {n_open} experts ({opened})")
        early = [layer for layer in self.moe.layers if layer < self.ask.from_layer]
        require(not early, "model.moe.layers", f"{early} are of the trunk, below what is asked (model.ask.from_layer)")
        first_upper = self.ask.from_layer or min(self.moe.layers, default=0)
        early = [layer for layer in self.personal.layers if layer < first_upper]
        require(not early, "model.personal.layers", f"{early} lie below the first that may be personal, {first_upper}")

    @property
    def is_asked(self) -> bool:
        """Whether the layers above the analyser are asked under the hypothesis of each service."""
        return self.ask.from_layer > 0

    @property
    def n_trunk(self) -> int:
        """Layers below the first that is asked, mixed or personal."""
        if self.is_asked:
            return self.ask.from_layer
        return min((*self.moe.layers, *self.personal.layers), default=self.n_layers)

    @property
    def has_pointers(self) -> bool:
        """Whether the softmax is mixed with pointers."""
        return self.has_copies or self.text_pointer or self.transition_pointer or self.crossing_pointer

    @property
    def has_copies(self) -> bool:
        """Whether some of them give items of the user's own history again."""
        return self.pointer != "none"

    @property
    def has_service_pointers(self) -> bool:
        """Whether each service has a pointer, beside the one over all."""
        return self.pointer == "services"
