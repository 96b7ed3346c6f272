"""Personalisation: a profile over all services that is kept event by event, and what the model reads of it."""

from moerec.nn.profile.api import Basis, Event, Personalizer, ProfileMemory, ProfileRequest, ProfileState, UserState
from moerec.nn.profile.memory import (
    LowRankParams,
    MemoryParams,
    MemorySizes,
    delta_memory,
    ema_memory,
    low_rank_memory,
    null,
)

__all__ = [
    "Basis",
    "Event",
    "LowRankParams",
    "MemoryParams",
    "MemorySizes",
    "Personalizer",
    "ProfileMemory",
    "ProfileRequest",
    "ProfileState",
    "UserState",
    "delta_memory",
    "ema_memory",
    "low_rank_memory",
    "null",
]
