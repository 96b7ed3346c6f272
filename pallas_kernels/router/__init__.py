"""Routing in one pass: logits, softmax, the best k, and the sufficient statistics of every balance loss."""

from pallas_kernels.router.api import BACKENDS, Routed, route

__all__ = ["BACKENDS", "Routed", "route"]
