"""What devices say that hold experts of the same layers: part of the closed table in `messages.py`.

Knows: what is said. Does not know: how it travels, or who holds what and why.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """Of one layer: the experts that one device holds. Expert e is bit e % 8 (from the lowest) of byte e // 8."""

    device_id: str
    layer: int
    experts: bytes


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """Stage -> a device that holds experts of its layers, over a direct link; `request` is repeated in the answer.

    Payloads: the rows [n, hidden] in fp32, and int32 [uses, 2]: which of these rows goes through which expert. A third
    one, fp32 [uses], has their gates and asks for sums; uses come row after row then, equally many of each.
    """

    lease: int
    request: int
    layer: int


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """The answer. Payload: fp32 [uses, hidden], what each expert made of its row, not weighted; or sums [n, hidden]."""

    lease: int
    request: int


@dataclass(frozen=True, slots=True)
class ExpertsRefused:
    """The answer where it can't be given."""

    lease: int
    request: int
    code: str
    reason: str
