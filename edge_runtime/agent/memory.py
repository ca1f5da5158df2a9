"""What fits into `memory_budget_bytes`, which is the whole process: interpreter, weights, KV and scratch.

Knows: sizes. Does not know: where weights come from, or how KV is laid out.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundle.manifest import Manifest
from edge_runtime.errors import CapacityError

SCRATCH_BYTES = 32 << 20  # rows of a step, frames on their way, chunks being fetched
MIN_KV_TOKENS = 32  # one page: less is no stage
KV_CONTEXTS = 16  # KV beyond this many full contexts would never be used
MIN_KV_CAP_TOKENS = 1 << 15

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Of this process, now (its peak where the system does not say)."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """`overhead_bytes`: the process as it was before it held any weights."""

    total_bytes: int
    overhead_bytes: int

    @property
    def free_bytes(self) -> int:
        """For weights and KV."""
        return max(0, self.total_bytes - self.overhead_bytes - SCRATCH_BYTES)

    def kv_bytes(self, manifest: Manifest, first_layer: int, last_layer: int) -> int:
        """KV gets what the weights of these layers leave. Raises CapacityError with both numbers."""
        weight_bytes = manifest.stage_weight_bytes(first_layer, last_layer)
        token_bytes = manifest.model.kv_bytes_per_token_per_layer * (last_layer - first_layer + 1)
        left_bytes = self.free_bytes - weight_bytes
        if left_bytes < MIN_KV_TOKENS * token_bytes:
            raise CapacityError(
                f"layers {first_layer}-{last_layer} need {_mib(weight_bytes)} of weights and "
                f"{_mib(self.overhead_bytes + SCRATCH_BYTES + MIN_KV_TOKENS * token_bytes)} for the process; "
                f"the budget of this device is {_mib(self.total_bytes)}",
                hint="give the agent more --memory, or this device fewer layers",
            )
        cap_tokens = max(MIN_KV_CAP_TOKENS, KV_CONTEXTS * manifest.model.max_context_tokens)
        return min(left_bytes, cap_tokens * token_bytes)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
