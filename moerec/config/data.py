"""Where the data comes from, and how it is split and packed."""

import dataclasses
import itertools
import math
import re
import zoneinfo

from moerec.config.checks import one_of, require, require_seed

MAX_QUANTILES = 1000  # ranges of a numeric column


@dataclasses.dataclass
class CityConfig:
    """The built-in world (`moerec.data.city`). Knobs at zero switch an effect off entirely."""

    n_users: int = 2000
    events_per_user: float = 80.0  # mean of the number of events
    items_per_service: int = 600
    n_types: int = 8  # taste types, each shared over services with probability `rho` or private to a service
    n_needs: int = 12  # discrete needs
    rho: float = 0.7  # probability that a user's type in a service is their shared one
    kappa: float = 1.0  # strength of hour, weekday, season, weather and holiday on the needs' transitions
    tau: float = 1.0  # recency: how much the needs drift, and how much the last need matters for the next
    habit: float = 1.0  # strength of brand loyalty and of buying (or, a durable, not buying) the very same item again
    own_dynamics: float = 0.0  # strength of each service's own laws of repeats and follow-ups: `city/dynamics.py`
    n_services: int = 3  # a multiple of 3: as many of each kind (food, marketplace, health)
    n_closed: int = 0  # events for which each service in turn is closed to a user; 0: all are always open
    identical_users: bool = False
    identical_services: bool = False
    random_services: bool = False  # a control: items are labelled with services at random; there is no ceiling then
    profile_missing_rate: float = 0.3
    profile_noise_rate: float = 0.15

    def __post_init__(self):
        for name in ("n_users", "items_per_service", "n_types", "n_needs"):
            require(getattr(self, name) >= 1, f"data.city.{name}", "must be at least 1")
        require(
            self.n_services >= 3 and self.n_services % 3 == 0, "data.city.n_services", "must be 3 or a multiple of it"
        )
        require(self.n_closed >= 0, "data.city.n_closed", "must not be negative")
        require(self.events_per_user >= 3, "data.city.events_per_user", "must be at least 3")
        for name in ("rho", "own_dynamics", "profile_missing_rate", "profile_noise_rate"):
            require(0 <= getattr(self, name) <= 1, f"data.city.{name}", "must lie in [0, 1]")
        for name in ("kappa", "tau", "habit"):
            require(0 <= getattr(self, name) <= 10, f"data.city.{name}", "must lie in [0, 10]")
        is_alike = self.identical_services and self.own_dynamics > 0
        require(not is_alike, "data.city.own_dynamics", "must be 0 with identical_services: it makes services differ")


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
    zone: str = "UTC"  # IANA time zone of everybody's clock, such as Europe/Moscow
    zone_column: str = ""  # a column of context (or else of profile) whose values may have other zones: see `zones`
    zones: tuple[str, ...] = ()  # "value=Area/City"
    context: tuple[str, ...] = ()
    context_edges: tuple[str, ...] = ()  # "column=edge,edge,…": a numeric column of `context`, cut into ranges there
    item_id: str = "item"  # columns of the item table
    item_service: str = ""
    text: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()  # columns of category-like values, each a list separated by `attribute_separator`
    attribute_separator: str = ","
    item_numbers: tuple[
        str, ...
    ] = ()  # numeric columns of items: "column=edge,edge,…" or "column=quantiles:N" (ranges)
    profile: tuple[str, ...] = ()  # columns of the user table
    profile_id: str = "user"
    categorical: tuple[str, ...] = ()  # columns of context, attributes or profile whose numbers are codes, not amounts

    def __post_init__(self):
        for name in ("service_name", "attribute_separator"):
            require(_is_text(getattr(self, name)), f"data.schema.{name}", "is no valid UTF-8, or holds a NUL character")
        require(bool(self.attribute_separator), "data.schema.attribute_separator", "must not be empty")
        require(bool(self.user), "data.schema.user", "a column is needed")
        require(bool(self.item), "data.schema.item", "a column is needed")
        one_of(self.time_unit, "data.schema.time_unit", ("s", "ms", "day", "iso"))
        require(bool(self.service) or bool(self.service_name), "data.schema.service_name", "must not be empty")
        require(self.service_name != "all", "data.schema.service_name", '"all" is the sum of the services')
        require(bool(self.zones) == bool(self.zone_column), "data.schema.zones", "it and zone_column need each other")
        for field, zone in (("zone", self.zone), *(("zones", zone) for zone in self.zone_of.values())):
            require(_is_zone(zone), f"data.schema.{field}", f"{zone!r} is no IANA time zone, such as Europe/Moscow")
        for column in self.edges:
            require(column in self.context, "data.schema.context_edges", f"{column!r} is no column of context")
        for column in self.item_ranges:
            require(column not in self.attributes, "data.schema.item_numbers", f"{column!r} is in attributes, too")
        named = {*self.context, *self.attributes, *self.profile} - {*self.edges}
        for column in self.categorical:
            known = "is no column of attributes, profile or context without edges"
            require(column in named, "data.schema.categorical", f"{column!r} {known}")

    @property
    def zone_of(self) -> dict[str, str]:
        """The time zone of each value of `zone_column` that has its own."""
        found = {}
        for entry in self.zones:
            value, _, zone = entry.rpartition("=")
            require(bool(value and zone), "data.schema.zones", f'{entry!r} is not of the form "value=Area/City"')
            require(value not in found, "data.schema.zones", f"{value!r} is there twice")
            found[value] = zone
        return found

    @property
    def edges(self) -> dict[str, tuple[float, ...]]:
        """Of each numeric column of the context, where its ranges meet; each edge belongs to the range above it."""
        return _read_edges(self.context_edges, "data.schema.context_edges")

    @property
    def item_ranges(self) -> dict[str, tuple[float, ...] | int]:
        """Of each numeric column of the items, where its ranges meet, or into how many ranges quantiles cut it."""
        by_quantiles: dict[str, int] = {}
        for entry in self.item_numbers:
            column, by, n = entry.rpartition("=quantiles:")
            if by:
                is_count = bool(column) and n.isascii() and n.isdigit() and 2 <= int(n) <= MAX_QUANTILES
                form = f'{entry!r} is not of the form "column=quantiles:10", with 2 to {MAX_QUANTILES} ranges'
                require(is_count, "data.schema.item_numbers", form)
                require(column not in by_quantiles, "data.schema.item_numbers", f"{column!r} is there twice")
                by_quantiles[column] = int(n)
        by_edges = [entry for entry in self.item_numbers if "=quantiles:" not in entry]
        found = _read_edges(tuple(by_edges), "data.schema.item_numbers")
        for column in by_quantiles:
            require(column not in found, "data.schema.item_numbers", f"{column!r} is there twice")
        return {**found, **by_quantiles}


def _read_edges(entries: tuple[str, ...], field: str) -> dict[str, tuple[float, ...]]:
    """Column -> its edges, from entries `column=edge,edge,…`."""
    found: dict[str, tuple[float, ...]] = {}
    for entry in entries:
        column, _, numbers = entry.rpartition("=")
        try:
            edges = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            edges = ()
        rising = all(a < b for a, b in itertools.pairwise(edges)) and all(map(math.isfinite, edges))
        form = f'{entry!r} is not of the form "column=-10,0,10", with rising numbers'
        require(bool(column and edges) and rising, field, form)
        require(column not in found, field, f"{column!r} is there twice")
        found[column] = edges
    return found


def _is_text(value: str) -> bool:
    """Whether a value can be written as UTF-8 and read again."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_zone(name: str) -> bool:
    try:
        return name == "UTC" or bool(zoneinfo.ZoneInfo(name))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False


@dataclasses.dataclass
class TablesConfig:
    """Where the tables are. `folder` is relative to the current directory."""

    folder: str = ""
    interactions: str = "interactions.tsv.gz"
    items: str = ""  # without it the catalogue is the items of the interactions
    users: str = ""
    format: str = "auto"  # auto (by the file's ending), tsv, csv, parquet, atomic
    on_bad_rows: str = "error"  # error or quarantine
    duplicates: str = "refuse"  # the same user, item, action and time twice: refuse (a defect) or keep
    line_breaks: str = "refuse"  # a value of several lines in a CSV file: refuse (mostly an open quote) or keep
    unknown_time: str = "refuse"  # an empty time: refuse (a defect) or keep (as unknown, in its published place)

    def __post_init__(self):
        one_of(self.format, "data.tables.format", ("auto", "tsv", "csv", "parquet", "atomic"))
        one_of(self.on_bad_rows, "data.tables.on_bad_rows", ("error", "quarantine"))
        one_of(self.duplicates, "data.tables.duplicates", ("refuse", "keep"))
        one_of(self.line_breaks, "data.tables.line_breaks", ("refuse", "keep"))
        one_of(self.unknown_time, "data.tables.unknown_time", ("refuse", "keep"))


@dataclasses.dataclass
class SplitConfig:
    """Which events are trained on, validated on and tested on."""

    kind: str = "leave_one_out"  # leave_one_out, time or user
    per_service: bool = False  # leave_one_out: the last two of each user *and service*
    past_only: bool = False  # per_service: learn only from what is earlier than all that the other services hold out
    valid_from: str = ""  # time: ISO dates (UTC)
    test_from: str = ""
    user_fraction: float = 0.1  # user: share of users held out for validation, and as many for the test
    shuffle_ties: bool = False  # order equal times of a user at random instead of as published

    def __post_init__(self):
        one_of(self.kind, "data.split.kind", ("leave_one_out", "time", "user"))
        is_fit = not self.past_only or (self.kind == "leave_one_out" and self.per_service)
        require(is_fit, "data.split.past_only", "belongs to leave_one_out with per_service")
        require(0 < self.user_fraction < 0.5, "data.split.user_fraction", "must lie in (0, .5)")
        if self.kind == "time":
            require(bool(self.valid_from and self.test_from), "data.split.valid_from", "a time split needs both dates")

    @property
    def by_user(self) -> bool:
        """Whether the users of test targets are nowhere trained on."""
        return self.kind == "user"

    @property
    def is_per_service(self) -> bool:
        """Whether events are held out of each service's sequence apart."""
        return self.kind == "leave_one_out" and self.per_service


@dataclasses.dataclass
class CorpusConfig:
    """Documents, for `source` text and for `mix`: of one `path`, or several corpora by name, each with a share."""

    path: str = ""  # a file of documents (.txt, .jsonl, .parquet; .txt and .jsonl also .gz), or a folder of such files
    sources: tuple[str, ...] = ()  # "name=path" of each corpus; or "name=city:KIND", texts of the built-in world
    weights: tuple[str, ...] = ()  # "name=number" of each: its share of the tokens trained on; empty: by its size
    city_documents: int = 10_000  # documents of each corpus of the built-in world (data.city, data.seed)
    duplicates: str = "drop"  # a document that was there before, in whichever corpus: drop or keep
    tokenizer: str = ""  # a Hugging Face tokenizer.json; empty: a byte-level BPE is trained on the documents
    vocab_size: int = 8192  # tokens of the one that is trained
    valid_fraction: float = 0.02  # share of the documents that are held out, by their hashes

    def __post_init__(self):
        require(self.vocab_size >= 1, "data.corpus.vocab_size", "must be at least 1")
        require(self.city_documents >= 1, "data.corpus.city_documents", "must be at least 1")
        require(0 <= self.valid_fraction < 1, "data.corpus.valid_fraction", "must lie in [0, 1)")
        one_of(self.duplicates, "data.corpus.duplicates", ("drop", "keep"))
        require(not (self.path and self.sources), "data.corpus.sources", "there is a path, too; give one of them")
        weights, sources = self.weight_of, self.source_of
        for name in weights:
            require(name in sources, "data.corpus.weights", f"{name!r} is no corpus of sources")
        for name in sources if weights else ():
            require(name in weights, "data.corpus.weights", f"that of {name!r} is missing; all have one, or none")
        require(not weights or sum(weights.values()) > 0, "data.corpus.weights", "must not all be 0")

    @property
    def source_of(self) -> dict[str, str]:
        """Where each named corpus is from."""
        return _read_pairs(self.sources, "data.corpus.sources", '"name=path"')

    @property
    def weight_of(self) -> dict[str, float]:
        """The weight of each named corpus, where weights are given."""
        found = {}
        for name, digits in _read_pairs(self.weights, "data.corpus.weights", '"name=number"').items():
            try:
                weight = float(digits)
            except ValueError:
                weight = -1.0
            is_weight = math.isfinite(weight) and weight >= 0
            require(is_weight, "data.corpus.weights", f"{digits!r} of {name!r} is no number of at least 0")
            found[name] = weight
        return found


@dataclasses.dataclass
class MixConfig:
    """Words beside events in one stream: what its slots are shared out among, and what is made of the items' texts.

    Shares are in any measure; each of the streams with one has a row of each batch at least.
    """

    events: float = 1.0  # of the users' sequences: the task next_event
    documents: float = 0.0  # of `corpus`: the task lm
    item_texts: float = 0.0  # of items with their texts: the tasks text_to_item and item_to_text
    held_out: float = 0.1  # share of the items, by a hash of their texts, that these two are not trained on
    max_tokens: int = 32  # most tokens of an item's text
    history: int = 0  # each second text stands behind up to so many events of a user; 0: none does
    prepared: str = ""  # a folder of documents that experiments.prepare wrote, instead of `corpus`

    def __post_init__(self):
        for name in MIXED:
            share = getattr(self, name)
            require(0 <= share < math.inf, f"data.mix.{name}", "must be a number of at least 0")
        require(0 <= self.held_out < 1, "data.mix.held_out", "must lie in [0, 1)")
        require(self.max_tokens >= 1, "data.mix.max_tokens", "must be at least 1")
        require(self.history >= 0, "data.mix.history", "must not be negative")
        require(self.item_texts > 0 or not self.history, "data.mix.history", "needs data.mix.item_texts")
        require(self.events > 0, "data.mix.events", "must be positive; of words alone is data.source text")

    @property
    def shares(self) -> dict[str, float]:
        """Of each stream that has one, in the order in which their rows stand in a batch."""
        return {name: share for name in MIXED if (share := getattr(self, name)) > 0}

    @property
    def has_words(self) -> bool:
        """Whether there is anything but events."""
        return len(self.shares) > 1


MIXED = ("events", "item_texts", "documents")  # those with the items' softmax first, those with the tokens' last


def _read_pairs(entries: tuple[str, ...], field: str, form: str) -> dict[str, str]:
    """Name -> value, from entries `name=value`; names are words, which stand in tables and in names of metrics."""
    found: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        is_pair = bool(re.fullmatch(r"[\w.-]+", name) and value)
        require(is_pair, field, f"{entry!r} is not of the form {form}, with a name of letters, digits and ._-")
        require(name not in found, field, f"{name!r} is there twice")
        found[name] = value
    return found


@dataclasses.dataclass
class DataConfig:
    source: str = "city"  # city, tables, prepared (a folder that experiments.prepare wrote), or text (of `corpus`)
    prepared: str = ""  # that folder; with `source` text one of documents, which are taken from there
    city: CityConfig = dataclasses.field(default_factory=CityConfig)
    tables: TablesConfig = dataclasses.field(default_factory=TablesConfig)
    schema: SchemaConfig = dataclasses.field(default_factory=SchemaConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    seed: int = 0  # the city, the permutation of item ids, the split by user
    seq_len: int = 128  # slots of a packed row
    history_len: int = 128  # most slots of one user's sequence that a prediction sees
    first_event: bool = True  # sequences begin with a control slot, from which each user's first event is predicted
    reader: str = "memory"  # training events from memory, or from the shards as they are needed
    n_shards: int = 4  # ArrayRecord files of a prepared folder
    item_tokens: str = "subwords"  # of items' texts: subwords (BPE), words, or plain_words, those of format 1
    item_tokenizer: str = ""  # subwords: a tokenizer.json, or its folder; empty: one is trained on the items' texts
    max_tokens: int = 24  # tokens of an item's text; of plain_words, attributes among them
    max_attributes: int = 16  # attributes of an item
    vocab_size: int = 20000  # most tokens of texts, and most attributes, that the items' vocabulary has
    item_states: str = ""  # the run of a language model whose states of the items' texts are stored with the data
    text_neighbors: int = 0  # items of the same service whose texts are nearest, kept of each item; 0 makes no table
    transition_neighbors: int = 0  # those that stand near it in training histories; 0 makes no table
    crossing_neighbors: int = 0  # those of other services that do so; 0 makes no table

    def __post_init__(self):
        one_of(self.source, "data.source", ("city", "tables", "prepared", "text"))
        one_of(self.reader, "data.reader", ("memory", "shards"))
        shuffled_shards = self.reader == "shards" and self.split.shuffle_ties
        require(not shuffled_shards, "data.reader", "shards keep the published order; split.shuffle_ties needs memory")
        if self.source == "tables":
            require(bool(self.tables.folder), "data.tables.folder", "the folder of the tables is needed")
            column, columns = self.schema.zone_column, (*self.schema.context, *self.schema.profile)
            is_known = not column or column in columns
            require(is_known, "data.schema.zone_column", f"{column!r} is no column of context or profile")
        if self.source == "prepared":
            require(bool(self.prepared), "data.prepared", "the prepared folder is needed")
        require_seed(self.seed, "data.seed")
        require(self.seq_len >= 1, "data.seq_len", "must be at least 1")
        require(1 <= self.history_len <= self.seq_len, "data.history_len", "must lie in [1, data.seq_len]")
        for name in ("n_shards", "max_tokens", "vocab_size"):
            require(getattr(self, name) >= 1, f"data.{name}", "must be at least 1")
        if self.mix.has_words:
            require(self.source != "text", "data.mix", "words beside events need events; data.source text has none")
        if self.mix.item_texts:
            is_long = self.mix.max_tokens < self.history_len
            require(is_long, "data.mix.max_tokens", "must be below data.history_len: an item takes a slot, too")
            most = self.history_len - self.mix.max_tokens - 2  # two control tokens
            told = f"leaves no room for the words: at most {most}, as data.history_len and data.mix.max_tokens are"
            require(self.mix.history <= max(most, 0), "data.mix.history", told)
        one_of(self.item_tokens, "data.item_tokens", ("subwords", "words", "plain_words"))
        has_subwords = self.item_tokens == "subwords" or not self.item_tokenizer
        require(has_subwords, "data.item_tokenizer", "belongs to data.item_tokens subwords")
        for name in ("max_attributes", "text_neighbors", "transition_neighbors", "crossing_neighbors"):
            require(getattr(self, name) >= 0, f"data.{name}", "must not be negative")

    @property
    def item_width(self) -> int:
        """Most tokens of an item."""
        return self.max_tokens + (0 if self.item_tokens == "plain_words" else self.max_attributes)

    @property
    def neighbor_widths(self) -> dict[str, int]:
        """How many neighbors of each item the tables keep, by kind; those that there are."""
        widths = {
            "text": self.text_neighbors,
            "transitions": self.transition_neighbors,
            "crossings": self.crossing_neighbors,
        }
        return {kind: width for kind, width in widths.items() if width}
