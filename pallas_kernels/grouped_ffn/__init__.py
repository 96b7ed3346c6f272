"""Gated feed-forward networks of many experts, each over the rows that chose it."""

from pallas_kernels.grouped_ffn.api import BACKENDS, grouped_ffn
from pallas_kernels.grouped_ffn.ragged import has_tokamax
from pallas_kernels.grouped_ffn.reference import grouped_ffn_reference

__all__ = ["BACKENDS", "grouped_ffn", "grouped_ffn_reference", "has_tokamax"]
