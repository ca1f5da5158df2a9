"""Who runs which layers: values in, a Plan with its reasons out. Pure: no clock, no sockets."""

from coordinator.planning.planner import place, replan

__all__ = ["place", "replan"]
