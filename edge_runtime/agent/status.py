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
    expert_cache_bytes: int = 0  # 0: no experts, or all of them in memory
    expert_bytes: int = 0
    early_quality: str = ""  # what it may cost that experts are used before they are whole; "": they are not

    def __str__(self) -> str:
        text = (
            f"serving layers {self.first_layer}-{self.last_layer} of {self.model}: "
            f"{self.weight_bytes / (1 << 20):.1f} MiB of weights, room for {self.kv_capacity_tokens} tokens"
        )
        if not self.expert_cache_bytes:
            return text
        text = (
            f"{text}; experts on flash: {self.expert_cache_bytes / (1 << 20):.1f} of "
            f"{self.expert_bytes / (1 << 20):.1f} MiB in memory at a time"
        )
        return f"{text}, used before they are whole ({self.early_quality})" if self.early_quality else text


@dataclass(frozen=True, slots=True)
class Holding:
    """Experts of other devices' layers, and no layers."""

    lease: int
    model: str
    held_bytes: int

    def __str__(self) -> str:
        return f"holding {self.held_bytes / (1 << 20):.1f} MiB of experts of {self.model} for others"


@dataclass(frozen=True, slots=True)
class Experts:
    """What the expert cache did since the last such line; the worst layer and `mended` since the stage was loaded."""

    hits: int
    misses: int
    read_bytes: int
    waited_seconds: float
    worst_layer: int
    worst_layer_hit_rate: float
    mended: int  # reads that failed or gave wrong bytes at first
    fewer_bits: int = 0  # of hits and misses: computed before all bits were there
    quality: str = ""  # perplexity with such experts and with whole ones; "": the device uses only whole ones
    peers: str = ""  # what other devices computed instead, since the stage was loaded
    prediction: str = ""  # how well the next layer's experts are foretold, and what is done about it

    def __str__(self) -> str:
        rate = 100 * self.hits / max(1, self.hits + self.misses)
        text = (
            f"experts: {rate:.1f} % of {self.hits + self.misses} were in memory, {self.read_bytes / (1 << 20):.1f} MiB "
            f"read, {self.waited_seconds:.1f} s waited; worst layer {self.worst_layer} "
            f"({100 * self.worst_layer_hit_rate:.1f} %)"
        )
        if self.quality:
            share = 100 * self.fewer_bits / max(1, self.hits + self.misses)
            text = f"{text}; {share:.1f} % computed before they were whole ({self.quality})"
        if self.peers:
            text = f"{text}; {self.peers}"
        if self.prediction:
            text = f"{text}; {self.prediction}"
        return f"{text}; {self.mended} bad reads mended" if self.mended else text


@dataclass(frozen=True, slots=True)
class Failed:
    lease: int
    reason: str
    hint: str

    def __str__(self) -> str:
        return f"can't serve: {self.reason}" + (f" ({self.hint})" if self.hint else "")


Status = Paired | Connected | Disconnected | Loading | Serving | Holding | Experts | Failed
