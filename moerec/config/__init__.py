"""Typed configuration. Every class checks itself on construction; `checked` re-checks after command-line overrides.

The classes are not frozen only because `ml_collections.config_flags` sets fields in place; nothing of ours may.
"""

import dataclasses

from moerec.config.checks import require, require_seed
from moerec.config.data import (
    CityConfig,
    CorpusConfig,
    DataConfig,
    MixConfig,
    SchemaConfig,
    SplitConfig,
    TablesConfig,
)
from moerec.config.model import AskConfig, ModelConfig, MoEConfig, PersonalConfig, TextConfig, TimeConfig
from moerec.config.train import AuditConfig, EvalConfig, LossConfig, OptimConfig, TrainConfig

__all__ = [
    "DEFAULT_BASELINES",
    "AskConfig",
    "AuditConfig",
    "CityConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "EvalConfig",
    "LossConfig",
    "MixConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "PersonalConfig",
    "SchemaConfig",
    "SplitConfig",
    "TablesConfig",
    "TextConfig",
    "TimeConfig",
    "TrainConfig",
    "checked",
]

DEFAULT_BASELINES = (
    "popularity",
    "popularity_by_service",
    "popularity_recent",
    "markov",
    "item_knn",
    "item_knn_cross",
    "graph_text",
    "graph_text_own",
    "sasrec_one_negative",
    "sasrec_sampled",
    "sasrec_full",
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
    tasks: tuple[str, ...] = ("next_event",)  # what is learned
    baselines: tuple[str, ...] = DEFAULT_BASELINES

    def __post_init__(self):
        require_seed(self.seed, "seed")
        require(bool(self.tasks), "tasks", "at least one is needed")
        is_text = self.data.source == "text"
        require(not is_text or self.tasks == ("lm",), "tasks", "documents (data.source text) have the task lm alone")
        if not is_text:
            self._check_mix()
        for name in self.loss.weight_of:
            require(name in self.tasks, "loss.task_weights", f"{name!r} is none of config.tasks")
        for name in ("text", "transition", "crossing"):
            has_table = getattr(self.data, f"{name}_neighbors") > 0 or not getattr(self.model, f"{name}_pointer")
            require(has_table, f"model.{name}_pointer", f"needs neighbors: set data.{name}_neighbors, say to 64")
        for name in ("transition", "crossing"):
            is_told = "next_event" in self.tasks or not getattr(self.model, f"{name}_pointer")
            require(is_told, f"model.{name}_pointer", "needs the task next_event, whose targets its table has counted")
        has_text = self.model.item_text or self.model.item_states
        one_row = self.model.row_dropout == 0 or (has_text and not self.model.untrained_rows)
        require(one_row, "model.row_dropout", "needs texts (model.item_text), and model.untrained_rows=false")
        has_states = bool(self.data.item_states) or not self.model.item_states
        require(has_states, "model.item_states", "needs the run of a language model (data.item_states)")
        is_read = self.model.item_states or not self.data.item_states
        require(is_read, "data.item_states", "nothing reads them while model.item_states is false")

    def _check_mix(self):
        shares = self.data.mix.shares
        told = "lm needs documents (data.source text), or some beside events (data.mix.documents)"
        require("documents" in shares or "lm" not in self.tasks, "tasks", told)
        of_items = [name for name in ("text_to_item", "item_to_text") if name in self.tasks]
        told = f"{''.join(of_items[:1])} needs items with their texts beside events (data.mix.item_texts)"
        require("item_texts" in shares or not of_items, "tasks", told)
        if not self.data.mix.has_words:
            return
        # Tables of transitions have counted the very events that a text behind a history asks for, and later ones.
        tables = [name for name in ("transition", "crossing") if getattr(self.model, f"{name}_pointer")]
        why = f"cannot stand beside model.{''.join(tables[:1])}_pointer, whose table knows the answers"
        require(not (tables and self.data.mix.history), "data.mix.history", why)
        wanted = {"events": ("next_event",), "documents": ("lm",), "item_texts": ("text_to_item", "item_to_text")}
        for name, share in shares.items():
            is_learned = any(task in self.tasks for task in wanted[name])
            told = f"nothing is learned of them: config.tasks has no {' or '.join(wanted[name])}"
            require(is_learned, f"data.mix.{name}", told)
            is_there = share / sum(shares.values()) * self.train.batch_size >= 1
            require(is_there, f"data.mix.{name}", "comes to less than a row of a batch (train.batch_size)")


def checked(config):
    """The same configuration, built anew so that every check sees the overridden values."""
    fields = {
        field.name: checked(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }
    return type(config)(**fields)
