"""The nouns everything else is written in.

Knows: ids, layer ranges, sampling parameters and what one generated token is, each with its invariants.
Does not know: messages, devices' addresses, engines, or how anything is executed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

DeviceId = NewType("DeviceId", str)
"""Hex of the first 16 bytes of SHA-256 over the device's 32-byte CURVE public key; never a routing id."""

SessionId = NewType("SessionId", int)
"""One generation (one choice of one request) inside one coordinator; never used twice by it."""

RequestId = NewType("RequestId", str)
Digest = NewType("Digest", str)
"""`sha256:` followed by 64 lower-case hex digits."""

MAX_DEVICE_NAME_CHARACTERS = 64
DEVICE_NAME_RULE = f"a device name has 1 to {MAX_DEVICE_NAME_CHARACTERS} printable characters and no comma"


def is_device_name(text: str) -> bool:
    """Lists of names are written with commas, so none may be in one."""
    return 1 <= len(text) <= MAX_DEVICE_NAME_CHARACTERS and text.isprintable() and "," not in text


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Layers `first`..`last`, both included, counted from 0."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"a layer range needs 0 <= first <= last, not {self.first}..{self.last}")

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tail turns logits into one token id.

    Order of operations: repetition, presence and frequency penalties and logit bias on the raw logits, then
    temperature, then top-k, top-p and min-p, then argmax of (filtered log p + Gumbel noise).
    `temperature == 0` means no noise and no filters: the argmax of the penalised logits.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # unsigned 64 bit
    top_logprobs: int = -1  # -1: none asked for; 0: the chosen token's; n: and the n most likely

    def __post_init__(self) -> None:
        checks = (
            (0.0 <= self.temperature <= 100.0, "temperature must be between 0 and 100"),
            (self.top_k >= 0, "top_k must be 0 (all) or more"),
            (0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1"),
            (0.0 <= self.min_p <= 1.0, "min_p must be between 0 and 1"),
            (0.0 < self.repetition_penalty <= 100.0, "repetition_penalty must be above 0 and at most 100"),
            (-100.0 <= self.presence_penalty <= 100.0, "presence_penalty must be between -100 and 100"),
            (-100.0 <= self.frequency_penalty <= 100.0, "frequency_penalty must be between -100 and 100"),
            (0 <= self.seed < 2**64, "seed must fit an unsigned 64-bit integer"),
            (-1 <= self.top_logprobs <= 20, "top_logprobs must be between 0 and 20"),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities of the model's own distribution (before temperature and filters)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Token:
    """One id the tail committed, at its absolute position in the session (prompt included)."""

    position: int
    id: int
    logprob: TokenLogprob | None = None
    finish: str = field(default="")  # "" while going on; "stop" (an end-of-sequence id) or "length"
