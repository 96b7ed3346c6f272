"""Causal attention within packed segments, with biases by time and by group that are computed inside."""

from pallas_kernels.attention.api import BACKENDS, attend
from pallas_kernels.attention.buckets import find_bucket
from pallas_kernels.attention.plain import LIBRARIES, attend_plain
from pallas_kernels.attention.prefix import attend_few, attend_prefix, merge

__all__ = [
    "BACKENDS",
    "LIBRARIES",
    "attend",
    "attend_few",
    "attend_plain",
    "attend_prefix",
    "find_bucket",
    "merge",
]
