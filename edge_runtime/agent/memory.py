"""What fits into `memory_budget_bytes`, which is the whole process: interpreter, weights, experts, KV and scratch.

Knows: sizes. Does not know: where weights come from, or how KV is laid out.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundle.manifest import Manifest
from edge_runtime.errors import CapacityError
from edge_runtime.experts.flash_store import can_stay_on_flash, expert_bytes, token_cycle_bytes

SCRATCH_BYTES = 32 << 20  # rows of a step, frames on their way, chunks being fetched
MIN_KV_TOKENS = 32  # one page: less is no stage
KV_CONTEXTS = 16  # KV beyond this many full contexts would never be used
MIN_KV_CAP_TOKENS = 1 << 15
FLASH_KV_TOKENS = 4096  # what KV gets before the expert cache gets more than it needs

EXPERTS_AUTO = "auto"  # in memory where they fit, else as many as fit
EXPERTS_ALL = "all"  # in memory, or not at all
ExpertCacheSetting = int | str  # bytes, or one of the two

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Of this process, now (its peak where the system does not say)."""
    try:
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class StageMemory:
    """How a stage divides what it may use. Experts are all in memory where `expert_cache_bytes` is None."""

    kv_bytes: int
    expert_cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """`overhead_bytes`: the process as it was before it held any weights."""

    total_bytes: int
    overhead_bytes: int

    @property
    def free_bytes(self) -> int:
        """For weights and KV."""
        return max(0, self.total_bytes - self.overhead_bytes - SCRATCH_BYTES)

    def divide(
        self,
        manifest: Manifest,
        first_layer: int,
        last_layer: int,
        experts: ExpertCacheSetting = EXPERTS_AUTO,
    ) -> StageMemory:
        """Weights that must be here, then KV, then experts. Raises CapacityError with the numbers."""
        all_experts_bytes = expert_bytes(manifest, first_layer, last_layer)
        on_flash = all_experts_bytes > 0 and can_stay_on_flash(manifest, first_layer, last_layer)
        if experts == EXPERTS_ALL or not all_experts_bytes or (experts == EXPERTS_AUTO and not on_flash):
            return StageMemory(self.kv_bytes(manifest, first_layer, last_layer))
        token_bytes = manifest.model.kv_bytes_per_token_per_layer * (last_layer - first_layer + 1)
        dense_bytes = manifest.stage_weight_bytes(first_layer, last_layer) - all_experts_bytes
        cycle_bytes = min(token_cycle_bytes(manifest, first_layer, last_layer), all_experts_bytes)
        left_bytes = self.free_bytes - dense_bytes
        least_kv_bytes = MIN_KV_TOKENS * token_bytes
        wanted_kv_bytes = min(FLASH_KV_TOKENS, manifest.model.max_context_tokens) * token_bytes
        if experts == EXPERTS_AUTO:
            if left_bytes >= all_experts_bytes + wanted_kv_bytes:
                return StageMemory(self.kv_bytes(manifest, first_layer, last_layer))
            kv_bytes = max(least_kv_bytes, min(wanted_kv_bytes, left_bytes - 2 * cycle_bytes))
            cache_bytes = min(all_experts_bytes, left_bytes - kv_bytes)
        else:
            cache_bytes = min(int(experts), all_experts_bytes)
            if cache_bytes < cycle_bytes:
                raise CapacityError(
                    f"an expert cache of {_mib(cache_bytes)} is less than the {_mib(cycle_bytes)} of experts that one "
                    f"token uses in layers {first_layer}-{last_layer}: it would never hold what is asked for",
                    hint="raise --expert-cache, or give this device fewer layers",
                )
        if cache_bytes < cycle_bytes or left_bytes < cache_bytes + least_kv_bytes:
            raise self._too_small_for_experts(
                first_layer,
                last_layer,
                dense_bytes,
                max(cache_bytes, cycle_bytes),
                least_kv_bytes,
                cycle_bytes,
            )
        cap_bytes = _kv_cap_tokens(manifest) * token_bytes
        return StageMemory(min(left_bytes - cache_bytes, cap_bytes), cache_bytes)

    def _too_small_for_experts(
        self, first: int, last: int, dense_bytes: int, cache_bytes: int, kv_bytes: int, cycle_bytes: int
    ) -> CapacityError:
        process_bytes = self.overhead_bytes + SCRATCH_BYTES + kv_bytes
        return CapacityError(
            f"layers {first}-{last} need {_mib(dense_bytes)} of weights, {_mib(cache_bytes)} for experts "
            f"(one token uses {_mib(cycle_bytes)}) and {_mib(process_bytes)} for the process; "
            f"the budget of this device is {_mib(self.total_bytes)}",
            hint="give the agent more --memory, another --expert-cache, or this device fewer layers",
        )

    def kv_beside(self, manifest: Manifest, first_layer: int, last_layer: int, held_bytes: int) -> int:
        """KV where other devices hold experts, and this one `held_bytes` of them. Raises CapacityError."""
        others_bytes = expert_bytes(manifest, first_layer, last_layer) - held_bytes
        return MemoryBudget(self.total_bytes + others_bytes, self.overhead_bytes).kv_bytes(
            manifest, first_layer, last_layer
        )

    def check_held(self, held_bytes: int) -> None:
        """Of a device that only holds experts. Raises CapacityError."""
        if held_bytes > self.free_bytes:
            raise CapacityError(
                f"its experts are {_mib(held_bytes)}, and {_mib(self.free_bytes)} are free for them; "
                f"the budget of this device is {_mib(self.total_bytes)}",
                hint="give the agent more --memory, or let more devices share the experts",
            )

    def kv_bytes(self, manifest: Manifest, first_layer: int, last_layer: int) -> int:
        """With all weights in memory: KV gets what they leave. Raises CapacityError with both numbers."""
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
        return min(left_bytes, _kv_cap_tokens(manifest) * token_bytes)


def _kv_cap_tokens(manifest: Manifest) -> int:
    return max(MIN_KV_CAP_TOKENS, KV_CONTEXTS * manifest.model.max_context_tokens)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"
