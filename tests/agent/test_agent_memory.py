"""What a device's budget leaves for KV."""

from __future__ import annotations

from edge_runtime.agent.memory import MemoryBudget, resident_bytes
from edge_runtime.bundle import Bundle


def test_kv_gets_what_the_weights_leave(bundle: Bundle) -> None:
    manifest = bundle.manifest
    overhead = resident_bytes()
    small = MemoryBudget(overhead + (64 << 20), overhead)
    kv = small.kv_bytes(manifest, 0, 2)
    assert kv + manifest.stage_weight_bytes(0, 2) <= small.free_bytes
    large = MemoryBudget(1 << 50, overhead)
    assert large.kv_bytes(manifest, 0, 0) < 1 << 40  # bounded all the same
