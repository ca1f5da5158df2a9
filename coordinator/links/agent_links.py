"""All agents' connections: accepting them, finding one by device, relaying between members of a lease.

Knows: which connection is a device's current one. Does not know: plans (it asks who the members of a lease are),
sessions, the journal.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Sequence

from coordinator.links.agent_link import AgentLink, LinkHandler
from coordinator.slice_server import SliceServer
from edge_runtime.errors import ConnectionClosed
from edge_runtime.protocol.messages import Hello, Message, Relay
from edge_runtime.transport.base import Connection, Frame, Listener

log = logging.getLogger(__name__)

__all__ = ["AgentLinks", "LinkHandler"]


class AgentLinks:
    def __init__(
        self,
        listener: Listener,
        handler: LinkHandler,
        slices: SliceServer,
        *,
        members: Callable[[int], Collection[str]],
        timeout_seconds: float,
    ) -> None:
        """`members(lease)`: device ids of the pipeline under that lease, empty where it is over."""
        self._listener = listener
        self._handler = handler
        self._slices = slices
        self._members = members
        self._timeout_seconds = timeout_seconds
        self._links: dict[str, AgentLink] = {}
        self._numbers = itertools.count(1)

    @property
    def address(self) -> str:
        return self._listener.address

    async def run(self) -> None:
        """Accept until the listener is closed, or for ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    connection = await self._listener.accept()
                except ConnectionClosed:
                    break
                tasks.create_task(self._live(connection))
            for link in self._links.values():
                link.end("the coordinator stops")

    async def _live(self, connection: Connection) -> None:
        link = AgentLink(
            next(self._numbers),
            connection,
            self._handler,
            self._slices,
            timeout_seconds=self._timeout_seconds,
        )
        hello = await link.greet()
        if hello is None:
            return
        self._replace(link, hello)
        reason = await link.run()
        if self._links.get(link.device_id) is link:
            del self._links[link.device_id]
        self._handler.left(link.device_id, link.number, reason)

    def _replace(self, link: AgentLink, hello: Hello) -> None:
        """A rejoin counts once: the older connection ends, and what it still says is of an old number."""
        older = self._links.get(link.device_id)
        self._links[link.device_id] = link
        self._handler.joined(link.device_id, link.number, hello)
        if older is not None:
            older.end("the device connected again")

    def post(self, device_id: str, message: Message, payloads: Sequence[Frame] = ()) -> None:
        """Queue for a device; nothing happens where it is not connected (its loss is on the way as an event)."""
        link = self._links.get(device_id)
        if link is not None:
            link.post(message, payloads)

    def drop(self, device_id: str, connection: int, reason: str) -> None:
        link = self._links.get(device_id)
        if link is not None and link.number == connection:
            link.end(reason)

    async def cut(self, device_id: str, reason: str) -> None:
        """A revoked device: nothing it sends from now on is delivered."""
        link = self._links.get(device_id)
        if link is not None:
            link.end(reason)
        await self._listener.disconnect(device_id)

    def relay(self, source: str, relay: Relay, payloads: Sequence[memoryview]) -> None:
        """Between members of one live lease only. Frames of a lease that is over are dropped in silence."""
        members = self._members(relay.lease)
        if source in members and relay.peer in members and source != relay.peer:
            self.post(relay.peer, Relay(source, relay.lease), payloads)
