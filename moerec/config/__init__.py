"""Typed configuration. Every class checks itself on construction; `checked` re-checks after command-line overrides.

The classes are not frozen only because `ml_collections.config_flags` sets fields in place; nothing of ours may.
"""

import dataclasses

from moerec.config.checks import require, require_seed
from moerec.config.data import CityConfig, CorpusConfig, DataConfig, SchemaConfig, SplitConfig, TablesConfig
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
        require(is_text or "lm" not in self.tasks, "tasks", "lm needs documents (data.source text)")
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


def checked(config):
    """The same configuration, built anew so that every check sees the overridden values."""
    fields = {
        field.name: checked(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }
    return type(config)(**fields)
