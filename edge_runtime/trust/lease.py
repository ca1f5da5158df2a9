"""Peer leases: the coordinator's signed, numbered word on who may use a device's data port.

Knows: how one is signed, and when a received one is believed. Does not know: the data port itself.
"""

from __future__ import annotations

from edge_runtime.core import DeviceId
from edge_runtime.errors import TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import PeerLease, PeerLeaseBody
from edge_runtime.trust.identity import KEY_BYTES, SigningKey, device_id, verify

_DOMAIN = b"edge-runtime peer lease 1\0"  # so that a signature made for anything else can't pass for a lease


def sign_lease(signing_key: SigningKey, body: PeerLeaseBody) -> PeerLease:
    encoded = codec.encode_message(body)
    return PeerLease(body=encoded, signature=signing_key.sign(_DOMAIN + encoded))


class LeaseReader:
    """Believes leases by one signer, for one device, each with a higher number than the last."""

    def __init__(self, signing_public_key: bytes, own_device_id: DeviceId | str) -> None:
        self._signing_public_key = signing_public_key
        self._own_device_id = own_device_id
        self.number = -1  # of the last lease believed

    def accept(self, lease: PeerLease) -> PeerLeaseBody:
        """The lease's content. Raises TrustError (not believed) or ProtocolError (not a lease)."""
        if not verify(self._signing_public_key, lease.signature, _DOMAIN + lease.body):
            raise TrustError(
                "a peer lease without the coordinator's signature was refused", code="lease_signature"
            )
        body = codec.decode_message(lease.body)
        if not isinstance(body, PeerLeaseBody):
            raise TrustError("something signed that is not a peer lease was refused", code="lease_signature")
        if body.device_id != self._own_device_id:
            raise TrustError("a peer lease for another device was refused", code="lease_device")
        if body.number <= self.number:
            raise TrustError(
                f"peer lease {body.number} was refused: number {self.number} was seen already",
                code="lease_number",
            )
        for peer in body.peers:
            if len(peer.public_key) != KEY_BYTES or device_id(peer.public_key) != peer.device_id:
                raise TrustError(
                    "a peer lease names a device by a key that is not its own", code="lease_peer"
                )
        self.number = body.number
        return body
