"""What an agent is told at its start.

Knows: settings and their checks. Does not know: flags, files or environment variables they came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_runtime.core import DEVICE_NAME_RULE, is_device_name
from edge_runtime.errors import ConfigError
from edge_runtime.experts.prediction_setting import AUTO, SETTINGS
from edge_runtime.experts.start_bits import ALL_BITS, CHOICES

MIN_MEMORY_BYTES = 64 << 20
NO_DATA_PORT = -1
EXPERT_CACHES = ("auto", "all")
EXECUTORS = ("auto", "native", "onnx", "torch")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    name: str
    state_directory: Path  # key, pairing, fetched bundles, measurements
    memory_budget_bytes: int  # of the whole process
    threads: int
    join: str = ""  # a join link; "" where the device is paired already
    data_host: str = ""  # where peers dial this device; "" for the address that reaches the coordinator
    data_port: int = 0  # 0: any; NO_DATA_PORT: none, everything goes through the coordinator's relay
    advertised_address: str = (
        ""  # HOST:PORT that peers dial where it is not the one listened at (forwarded port)
    )
    log_level: str = "info"
    expert_cache: int | str = "auto"  # bytes; all: in memory or not at all; auto: what is left of the memory
    expert_start_bits: int = ALL_BITS  # of bit-nested experts before they are used; 0: all
    expert_prediction: str = AUTO  # what may be done about the next layer's experts
    executor: str = (
        "auto"  # native, onnx, torch, or auto: torch on a CUDA device, else native where it is fast
    )

    def __post_init__(self) -> None:
        checks = (
            (
                is_device_name(self.name),
                DEVICE_NAME_RULE,
            ),
            (self.memory_budget_bytes >= MIN_MEMORY_BYTES, "an agent needs at least 64 MiB of memory"),
            (self.threads >= 1, "an agent computes with at least 1 thread"),
            (
                not self.advertised_address or self.data_port != NO_DATA_PORT,
                "a device without a data port has no address to advertise",
            ),
            (
                self.expert_cache in EXPERT_CACHES
                if isinstance(self.expert_cache, str)
                else self.expert_cache > 0,
                f"an expert cache is a size above 0, or one of {', '.join(EXPERT_CACHES)}",
            ),
            (
                self.expert_start_bits in CHOICES,
                "experts can be used from 2 or 4 bits on, or whole (0)",
            ),
            (
                self.expert_prediction in SETTINGS,
                f"experts are predicted or not: choose one of {', '.join(SETTINGS)}",
            ),
            (self.executor in EXECUTORS, f"an executor is one of {', '.join(EXECUTORS)}"),
            (NO_DATA_PORT <= self.data_port <= 65535, "a data port is between 0 (any) and 65535"),
        )
        for holds, message in checks:
            if not holds:
                raise ConfigError(message, hint="edge-runtime agent --help lists the flags")
