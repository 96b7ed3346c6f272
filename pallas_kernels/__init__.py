"""Kernels of moerec, usable alone: jax only, nothing of moerec. One folder a kernel.

An array is named after its axes, `weight_TA` is `[T, A]`. Each letter has one meaning in the whole package:

- T rows of a layer, or slots of a sequence, which in attention ask as queries; D their width;
- A choices of a row, E experts, F width of an expert, R row slots (rows as they are routed, padded to whole tiles), L
  tiles, V visits of experts to tiles;
- X features that the router knows of a slot, Z domains that it counts by;
- B sequences, S key slots (of a sequence, or of the block at hand), N query heads, K key heads, Q query heads of one
  key head (N = K Q), H width of a head, J buckets of time, G groups of keys, M keys of a slot's own;
- where attention goes by blocks: P slots padded to whole blocks, I blocks of queries, C blocks of keys, U slots of a
  block, Y = Q U queries of one key head in a block, W = H + G columns. F of `slot_metadata_BFT` alone counts fields.
"""
