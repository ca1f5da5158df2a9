"""Experts on flash: where they lie, which stay in memory, and how the others are read while the rest computes."""
