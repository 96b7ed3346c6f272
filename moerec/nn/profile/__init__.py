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
    register_memory,
)
from moerec.nn.profile.profile_router import count_profile_slots, make_personalizer

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
    "count_profile_slots",
    "delta_memory",
    "ema_memory",
    "low_rank_memory",
    "make_personalizer",
    "null",
    "register_memory",
]
