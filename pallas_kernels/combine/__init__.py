"""Rows to the places of a plan and back, in gathers alone, forward and backward."""

from pallas_kernels.combine.api import SUMS, combine_rows, gather_rows, sum_places

__all__ = ["SUMS", "combine_rows", "gather_rows", "sum_places"]
