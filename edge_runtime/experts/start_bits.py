"""From how many bits on bit-nested experts are used: a setting that gives up exactness, and what a bundle says of it.

Knows: the setting, and the names of figures in a bundle. Does not know: planes, caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ALL_BITS = 0  # whole experts only: the same bits always
CHOICES = (ALL_BITS, 2, 4)
_ALL = "all"


def parse_start_bits(value: object) -> int:
    """ "all", "2" or "4". Raises ValueError."""
    bits = {_ALL: ALL_BITS, **{str(bits): bits for bits in CHOICES}}.get(str(value))
    if bits is None:
        raise ValueError(f"{value!r} is none of all, 2 and 4")
    return bits


def start_planes(plane_bits: Sequence[int], start_bits: int) -> int:
    """How many planes must be there before an expert is used, of one that has so many bits with one, two, … of them.

    All of them, where it has no prefix of so many bits.
    """
    return plane_bits.index(start_bits) + 1 if start_bits in plane_bits[:-1] else len(plane_bits)


def perplexity_name(start_bits: int) -> str:
    """In `Manifest.quality`: where every expert stays at the planes that give it so many bits."""
    return f"perplexity_{start_bits}_bits"


def early_quality(quality: Mapping[str, float], start_bits: int) -> str:
    """The worst that using experts early can do to a model, and the best: for people."""
    early, whole = quality.get(perplexity_name(start_bits)), quality.get("perplexity")
    if early is None or whole is None:
        return "nobody measured the perplexity"
    return f"perplexity {early:.3f} if all stayed at {start_bits} bits, {whole:.3f} with whole ones"
