"""Live connections to agents: greeting, measuring, serving slices, relaying, and everything else to the runtime."""

from coordinator.links.agent_links import AgentLinks, LinkHandler

__all__ = ["AgentLinks", "LinkHandler"]
