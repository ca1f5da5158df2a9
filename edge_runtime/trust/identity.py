"""Who a device is: a CURVE key pair for its links, and Ed25519 keys for what must be provable later.

Knows: how keys are made, kept (0600, never in an environment or argument) and written down, and how a device id
follows from a public key. Does not know: links, or who is allowed to do what.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from zmq.utils import z85

from edge_runtime.core import DeviceId
from edge_runtime.errors import TrustError

KEY_BYTES = 32
SIGNATURE_BYTES = 64


def device_id(public_key: bytes) -> DeviceId:
    """Hex of the first 16 bytes of SHA-256 over the public key."""
    return DeviceId(hashlib.sha256(public_key).hexdigest()[:32])


def fingerprint(public_key: bytes) -> str:
    """The device id in groups of four, for people to compare by eye."""
    text = device_id(public_key)
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def key_to_text(key: bytes) -> str:
    """Z85: 40 printable characters for 32 bytes."""
    return z85.encode(key).decode()


def key_from_text(text: str) -> bytes:
    try:
        key = z85.decode(text.encode("ascii"))
    except (ValueError, KeyError, struct.error) as error:
        raise TrustError(
            "a key is 40 characters of Z85, this text is not", hint="copy the key again"
        ) from error
    if len(key) != KEY_BYTES or z85.encode(key) != text.encode("ascii"):
        raise TrustError("a key is 40 characters of Z85, this text is not", hint="copy the key again")
    return bytes(key)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE (X25519) key pair; the public half is who the device is."""

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.public) != KEY_BYTES or len(self.secret) != KEY_BYTES:
            raise TrustError(f"a CURVE key has {KEY_BYTES} bytes")

    @property
    def device_id(self) -> DeviceId:
        return device_id(self.public)

    @classmethod
    def generate(cls) -> KeyPair:
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> KeyPair:
        """The key kept in `path`, made and stored there at the first call."""
        secret = _load_or_create_secret(Path(path), lambda: cls.generate().secret)
        return cls(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """An Ed25519 key: the coordinator's for peer leases and bundles, a browser's for its link."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise TrustError(f"an Ed25519 key has {KEY_BYTES} bytes")

    @property
    def public(self) -> bytes:
        return self._private().public_key().public_bytes_raw()

    @property
    def device_id(self) -> DeviceId:
        return device_id(self.public)

    def sign(self, data: bytes) -> bytes:
        return self._private().sign(data)

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(ed25519.Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> SigningKey:
        return cls(_load_or_create_secret(Path(path), lambda: cls.generate().secret))

    def _private(self) -> ed25519.Ed25519PrivateKey:
        return ed25519.Ed25519PrivateKey.from_private_bytes(self.secret)


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` is by the holder of `public_key`; False for malformed input, never an error."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _load_or_create_secret(path: Path, generate: Callable[[], bytes]) -> bytes:
    try:
        return _load_secret(path)
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _store_secret(path, generate())
    return _load_secret(path)


def _load_secret(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
            raise TrustError(
                f"the secret key {path} can be read by others",
                hint=f"chmod 600 {path}, or delete it and pair again",
            )
        text = file.read(1024).strip()
    try:
        return key_from_text(text)
    except TrustError as error:
        raise TrustError(
            f"{path} does not hold a secret key", hint="restore it from a backup, or delete it and pair again"
        ) from error


def _store_secret(path: Path, secret: bytes) -> None:
    """Appears whole or not at all, and never replaces a key another process has just made."""
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}."
    )  # mkstemp makes it 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(key_to_text(secret) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        os.unlink(temporary)
