"""The seed of each choice: a pure function, so that choice i of a request can be had again by itself."""

from __future__ import annotations

import hashlib

_DOMAIN = b"edge-runtime choice seed\0"


def choice_seed(seed: int, choice: int) -> int:
    """H(seed, choice): choice 0 keeps the seed, the others get 64 bits that depend on both."""
    if not 0 <= seed < 2**64 or choice < 0:
        raise ValueError("a seed is an unsigned 64-bit integer and a choice is counted from 0")
    if choice == 0:
        return seed
    text = _DOMAIN + seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
