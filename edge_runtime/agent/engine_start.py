"""What an agent does about its engine before it joins: load the libraries, and see what memory that leaves.

Knows: executors and budgets. Does not know: plans, links.
"""

from __future__ import annotations

from edge_runtime.agent.memory import MemoryBudget, resident_bytes
from edge_runtime.engine.executors import TORCH, device_memory_bytes


def import_engine(name: str) -> str:
    """Before memory is measured: the libraries are part of the process that the budget is for.

    Returns the executor that `auto` is on this device.
    """
    import edge_runtime.engine.probe  # noqa: F401
    from edge_runtime.engine.executors import device_executor, import_executor

    executor = device_executor(name)
    import_executor(executor)
    return executor


def budget_of(total_bytes: int, executor: str) -> MemoryBudget:
    """Of this process, or of a GPU: then the process itself is not in it."""
    gpu_bytes = device_memory_bytes(executor) if executor == TORCH else None
    if gpu_bytes is None:
        return MemoryBudget(total_bytes, resident_bytes())
    return MemoryBudget(min(total_bytes, gpu_bytes), 0)
