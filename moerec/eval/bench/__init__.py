"""Benchmarks of whole steps and of the preparation, as ratios within one run."""
