"""What a step is fed: batches of events, and rows of several streams in one batch."""

from moerec.data.pipeline.events import (
    EpochPlan,
    EventReader,
    MemoryReader,
    PackedIterator,
    PackedStream,
    Render,
    ShardReader,
    StreamOptions,
    plan_epoch,
)
from moerec.data.pipeline.item_texts import ItemTexts

__all__ = [
    "EpochPlan",
    "EventReader",
    "ItemTexts",
    "MemoryReader",
    "PackedIterator",
    "PackedStream",
    "Render",
    "ShardReader",
    "StreamOptions",
    "plan_epoch",
]
