"""Who runs which layers: values in, a Plan with its reasons out. Pure: no clock, no sockets."""

from coordinator.planning.planner import improved, place, replan
from coordinator.planning.replicas import place_all, place_another

__all__ = ["improved", "place", "place_all", "place_another", "replan"]
