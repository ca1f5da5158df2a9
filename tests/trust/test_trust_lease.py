"""A peer lease is believed once, by the device it is for, in the order of its number."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import EdgeRuntimeError, TrustError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import PeerEntry, PeerLease, PeerLeaseBody, Ping
from edge_runtime.trust.identity import KeyPair, SigningKey
from edge_runtime.trust.lease import LeaseReader, sign_lease

SIGNER = SigningKey.generate()
PEER = KeyPair.generate()
BODY = PeerLeaseBody(7, "me", (PeerEntry(PEER.device_id, PEER.public, "tcp://127.0.0.1:7000"),))


def test_a_signed_lease_is_believed_once() -> None:
    reader = LeaseReader(SIGNER.public, "me")
    lease = sign_lease(SIGNER, BODY)
    assert reader.accept(lease) == BODY
    with pytest.raises(TrustError, match="seen already"):
        reader.accept(lease)
    with pytest.raises(TrustError, match="seen already"):
        reader.accept(sign_lease(SIGNER, replace(BODY, number=6)))
    assert reader.accept(sign_lease(SIGNER, replace(BODY, number=8))).number == 8


@pytest.mark.parametrize(
    "lease",
    [
        sign_lease(SigningKey.generate(), BODY),
        sign_lease(SIGNER, replace(BODY, device_id="another")),
        sign_lease(
            SIGNER, replace(BODY, peers=(replace(BODY.peers[0], public_key=KeyPair.generate().public),))
        ),
        replace(sign_lease(SIGNER, BODY), body=codec.encode_message(replace(BODY, number=9))),
        PeerLease(
            codec.encode_message(BODY), SIGNER.sign(codec.encode_message(BODY))
        ),  # signed for no purpose
        PeerLease(codec.encode_message(Ping(1, 8)), b""),
    ],
)
def test_a_lease_that_is_not_for_us_or_not_by_the_coordinator_is_refused(lease: PeerLease) -> None:
    reader = LeaseReader(SIGNER.public, "me")
    with pytest.raises(TrustError):
        reader.accept(lease)
    assert reader.accept(sign_lease(SIGNER, BODY)) == BODY


@settings(deadline=None)
@given(st.data())
def test_no_changed_byte_is_believed(data: st.DataObject) -> None:
    lease = sign_lease(SIGNER, BODY)
    field = data.draw(st.sampled_from(["body", "signature"]))
    changed = bytearray(getattr(lease, field))
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(EdgeRuntimeError):
        LeaseReader(SIGNER.public, "me").accept(replace(lease, **{field: bytes(changed)}))
