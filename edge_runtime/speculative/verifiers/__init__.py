"""Somebody else's server as the verifier of greedy drafts: what is sent to it, and how its answers are read."""
