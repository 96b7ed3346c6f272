"""Personalisation: a profile over all services that is kept event by event, and what the model reads of it."""

from moerec.nn.profile.api import Basis, Condition, Event, Personalizer, Request, Slots, UserState
from moerec.nn.profile.memory import LowRankParams, MemoryParams, Sizes, delta_memory, ema_memory, low_rank_memory, null

__all__ = [
    "Basis",
    "Condition",
    "Event",
    "LowRankParams",
    "MemoryParams",
    "Personalizer",
    "Request",
    "Sizes",
    "Slots",
    "UserState",
    "delta_memory",
    "ema_memory",
    "low_rank_memory",
    "null",
]
