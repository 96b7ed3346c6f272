"""Rows to the row slots of a plan and back, in gathers alone, forward and backward."""

from pallas_kernels.combine.api import SUMS, combine_rows, gather_rows, unpermute_sum

__all__ = ["SUMS", "combine_rows", "gather_rows", "unpermute_sum"]
