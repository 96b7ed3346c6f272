"""Mixtures of domain experts: router, experts, their ways over a mesh, balance, and the semantic analyser."""
