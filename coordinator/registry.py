"""Who belongs to the cluster: paired devices, join links, revocation, and the signing of peer leases.

Knows: keys and names of devices, and what the journal has of them. Does not know: whether a device is connected, plans,
or HTTP. Wall-clock time is used for the life of join links and for display only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.journal.base import DeviceEntry, Journal
from edge_runtime.core import DeviceId
from edge_runtime.errors import UsageError
from edge_runtime.protocol.messages import Hello, PeerEntry, PeerLease, PeerLeaseBody, Refused
from edge_runtime.trust.admission import Admission
from edge_runtime.trust.identity import KeyPair, SigningKey
from edge_runtime.trust.lease import sign_lease
from edge_runtime.trust.tokens import TOKEN_LIFETIME_SECONDS, JoinLink, new_token, token_hash

log = logging.getLogger(__name__)

_DIALLED = "tcp://"


@dataclass(frozen=True, slots=True)
class Keys:
    """The coordinator's own: one for links, one for signatures. Both are made at the first start and stay."""

    link: KeyPair
    signing: SigningKey

    @classmethod
    def load_or_create(cls, directory: Path) -> Keys:
        return cls(
            KeyPair.load_or_create(directory / "link.key"),
            SigningKey.load_or_create(directory / "signing.key"),
        )


class Registry:
    """`admission` is what listeners ask; only this class changes it."""

    def __init__(self, journal: Journal, keys: Keys, *, wall_clock: Callable[[], float]) -> None:
        self.admission = Admission()
        self.keys = keys
        self._journal = journal
        self._wall_clock = wall_clock
        self._devices: dict[str, DeviceEntry] = {}
        self._unwritten: list[tuple[bytes, float]] = []  # join tokens that the journal has not seen yet
        self._writing = asyncio.Lock()

    async def load(self) -> None:
        for entry in await self._journal.devices():
            self._devices[entry.device_id] = entry
            if not entry.revoked:
                self.admission.allow(entry.public_key)

    @property
    def devices(self) -> list[DeviceEntry]:
        return list(self._devices.values())

    def find(self, name_or_id: str) -> DeviceEntry:
        """By id or name; of several with one name, the one that is not revoked. Raises UsageError."""
        found = [d for d in self._devices.values() if name_or_id in (d.device_id, d.name)]
        if not found:
            raise UsageError(
                f"no device is called {name_or_id!r}",
                hint="`edge-runtime devices` lists them",
                code="device_not_found",
            )
        return min(found, key=lambda device: device.revoked)

    # ------------------------------------------------------------ pairing

    def new_join_link(self, host: str, port: int, enroll_port: int) -> str:
        """A one-use link. Its token reaches the journal before anybody can spend it."""
        token = new_token()
        expires_at = self._wall_clock() + TOKEN_LIFETIME_SECONDS
        self._unwritten.append((bytes.fromhex(token_hash(token)), expires_at))
        return str(JoinLink(host, port, enroll_port, self.keys.link.public, token))

    async def write_tokens(self) -> None:
        async with self._writing:
            while self._unwritten:
                await self._journal.add_join_token(*self._unwritten[0])
                del self._unwritten[0]

    async def spend(self, hashed: str) -> str:
        await self.write_tokens()
        return await self._journal.spend_join_token(bytes.fromhex(hashed), self._wall_clock())

    async def register(self, device_id: DeviceId, name: str, public_key: bytes) -> None:
        """Durable, then admitted. Raises TrustError for a revoked key."""
        entry = DeviceEntry(device_id, self._free_name(name, device_id), public_key, self._wall_clock())
        await self._journal.record_device(entry)
        self._devices[device_id] = entry
        self.admission.allow(public_key)
        log.info("device %s is paired as %s", device_id, entry.name)

    def _free_name(self, name: str, device_id: str) -> str:
        """`phone`, or `phone-2` where another device has that name: people point at devices by name."""
        taken = {d.name for d in self._devices.values() if not d.revoked and d.device_id != device_id}
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}-{number}"
        return free

    async def revoke(self, name_or_id: str) -> DeviceEntry:
        """Durable, then out: the key is admitted no more and its connections are cut."""
        entry = self.find(name_or_id)
        await self._journal.revoke_device(entry.device_id)
        revoked = replace(entry, revoked=True)
        self._devices[entry.device_id] = revoked
        self.admission.revoke(entry.public_key)
        log.warning("device %s (%s) was revoked", entry.name, entry.device_id)
        return revoked

    # ------------------------------------------------------------ for the control loop

    def refusal(self, device_id: str, hello: Hello) -> Refused | None:
        entry = self._devices.get(device_id)
        if entry is None:
            return Refused("not_trusted", "this device is not paired", "pair it with a fresh join link")
        if entry.revoked:
            return Refused("revoked", f"{entry.name} was revoked", "pair it again under a new key")
        if hello.data_address and not hello.data_address.startswith(_DIALLED):
            return Refused("protocol", f"a data address starts with {_DIALLED}", "")
        return None

    def name(self, device_id: str, said: str) -> str:
        """The name it was paired under: what it says now could be another's."""
        entry = self._devices.get(device_id)
        return entry.name if entry is not None else said

    def peer_lease(self, number: int, device_id: str, addresses: Sequence[tuple[str, str]]) -> PeerLease:
        """`addresses`: (device id, data address) of the other members."""
        peers = tuple(
            PeerEntry(peer, self._devices[peer].public_key, address)
            for peer, address in addresses
            if peer in self._devices
        )
        return sign_lease(self.keys.signing, PeerLeaseBody(number, device_id, peers))
