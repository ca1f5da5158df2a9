"""What the agent tells the person who started it: a few kinds of line, no more.

Knows: the kinds and their text. Does not know: terminals, logs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paired:
    device_id: str
    coordinator: str

    def __str__(self) -> str:
        return f"paired with {self.coordinator} as device {self.device_id}"


@dataclass(frozen=True, slots=True)
class Connected:
    coordinator: str

    def __str__(self) -> str:
        return f"connected to {self.coordinator}; waiting for work"


@dataclass(frozen=True, slots=True)
class Disconnected:
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}; dialling again"


@dataclass(frozen=True, slots=True)
class Loading:
    lease: int
    activity: str
    done_bytes: int
    total_bytes: int

    def __str__(self) -> str:
        return f"{self.activity} {self.done_bytes / (1 << 20):.1f} of {self.total_bytes / (1 << 20):.1f} MiB"


@dataclass(frozen=True, slots=True)
class Serving:
    lease: int
    model: str
    first_layer: int
    last_layer: int
    weight_bytes: int
    kv_capacity_tokens: int

    def __str__(self) -> str:
        return (
            f"serving layers {self.first_layer}-{self.last_layer} of {self.model}: "
            f"{self.weight_bytes / (1 << 20):.1f} MiB of weights, room for {self.kv_capacity_tokens} tokens"
        )


@dataclass(frozen=True, slots=True)
class Failed:
    lease: int
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"can't serve: {self.reason}" + (f" ({self.hint})" if self.hint else "")


Status = Paired | Connected | Disconnected | Loading | Serving | Failed
