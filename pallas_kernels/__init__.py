"""Kernels of moerec, usable alone: jax only, nothing of moerec. One folder a kernel."""
