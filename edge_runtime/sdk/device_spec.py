"""DeviceSpec: one device of a LocalCluster.

Knows: a name and limits. Does not know: processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.config import parse_expert_cache, parse_size
from edge_runtime.core import DEVICE_NAME_RULE, is_device_name
from edge_runtime.errors import UsageError
from edge_runtime.experts.prediction_setting import AUTO, SETTINGS
from edge_runtime.experts.start_bits import parse_start_bits

DEFAULT_MEMORY = "1GiB"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """`memory` is the whole process: a size such as "512MiB", or bytes. `reachable=False`: only through the relay."""

    name: str
    memory: str | int = DEFAULT_MEMORY
    threads: int = 1
    reachable: bool = True
    expert_cache: str | int = "auto"  # memory for experts on flash: a size, "all" or "auto"
    expert_start_bits: str | int = (
        "all"  # 2, 4: use bit-nested experts early; tokens then depend on when reads end
    )
    expert_prediction: str = AUTO  # "off": never keep or read the next layer's experts on a guess

    def __post_init__(self) -> None:
        if not is_device_name(self.name) or "/" in self.name or self.name.startswith((".", "-")):
            hint = f"use letters, digits and dashes: {DEVICE_NAME_RULE}"
            raise UsageError(f"{self.name!r} is not a device name", hint=hint)
        if self.threads < 1:
            raise UsageError(f"device {self.name} needs at least 1 thread")
        if self.expert_prediction not in SETTINGS:
            hint = f"use one of {', '.join(SETTINGS)}"
            raise UsageError(f"device {self.name}: {self.expert_prediction!r} is no prediction", hint=hint)
        try:
            parse_expert_cache(self.expert_cache)
            parse_start_bits(self.expert_start_bits)
            parse_size(self.memory)
        except ValueError as problem:
            raise UsageError(f"device {self.name}: {problem}") from None

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)
