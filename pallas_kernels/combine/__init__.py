"""Rows to the places of a plan and back, in gathers alone, forward and backward."""

from pallas_kernels.combine.api import combine_rows, gather_rows, sum_places

__all__ = ["combine_rows", "gather_rows", "sum_places"]
