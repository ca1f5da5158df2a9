"""Who made a bundle: an Ed25519 signature over the manifest's bytes.

The slices are bound by their digests inside the manifest, so one signature covers any part of a bundle.
Knows: keys, the signature file. Does not know: which signers a user trusts beyond the set it is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from edge_runtime.errors import TamperedError, TrustError

_CONTEXT = b"edge-runtime bundle manifest 1\0"  # a signature made for another purpose is never valid here
MAX_SIGNATURE_FILE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class BundleSigningKey:
    """The exporter's secret key."""

    private_bytes: bytes  # 32

    @classmethod
    def generate(cls) -> BundleSigningKey:
        key = Ed25519PrivateKey.generate()
        return cls(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))

    @classmethod
    def load_or_create(cls, path: Path) -> BundleSigningKey:
        """Read the key file, or make one that only its owner can read."""
        if path.exists():
            return cls(bytes.fromhex(path.read_text().strip()))
        key = cls.generate()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(key.private_bytes.hex() + "\n")
        return key

    @property
    def public_bytes(self) -> bytes:
        key = Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, manifest: bytes) -> bytes:
        """The content of `manifest.sig`."""
        signature = Ed25519PrivateKey.from_private_bytes(self.private_bytes).sign(_CONTEXT + manifest)
        return json.dumps({"public_key": self.public_bytes.hex(), "signature": signature.hex()}).encode()


def verify_signature(manifest: bytes, signature_file: bytes, trusted: Collection[bytes] | None) -> bytes:
    """Return the signer's public key.

    `trusted` None accepts any signer (the digest itself came from someone trusted). Raises TamperedError, TrustError.
    """
    try:
        content = json.loads(signature_file[:MAX_SIGNATURE_FILE_BYTES])
        public_key, signature = bytes.fromhex(content["public_key"]), bytes.fromhex(content["signature"])
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _CONTEXT + manifest)
    except (ValueError, KeyError, TypeError, InvalidSignature):
        raise TamperedError(
            "slice manifest.sig: the manifest's signature is not valid",
            hint="the bundle was changed after it was signed: export or fetch it again",
        ) from None
    if trusted is not None and public_key not in trusted:
        raise TrustError(
            f"the bundle is signed by {public_key.hex()[:16]}…, which is not trusted here",
            hint="add the signer's key to the trusted ones if you know who made the bundle",
        )
    return public_key
