"""Keys are made once, kept unreadable for others, and never printed."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import TrustError
from edge_runtime.trust.identity import (
    KeyPair,
    SigningKey,
    device_id,
    fingerprint,
    key_from_text,
    key_to_text,
    verify,
)


@pytest.mark.parametrize("cls", [KeyPair, SigningKey])
def test_a_key_is_made_once_and_only_its_owner_can_read_it(
    cls: type[KeyPair] | type[SigningKey], tmp_path: Path
) -> None:
    path = tmp_path / "state" / "device.key"
    first = cls.load_or_create(path)
    assert cls.load_or_create(path) == first
    assert cls.load_or_create(path).public == first.public
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["device.key"]


def test_secrets_do_not_show_in_repr() -> None:
    pair, signing = KeyPair.generate(), SigningKey.generate()
    assert repr(pair.secret) not in repr(pair)
    assert repr(signing.secret) not in repr(signing)


def test_a_key_readable_by_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    KeyPair.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(TrustError, match="read by others"):
        KeyPair.load_or_create(path)


@pytest.mark.parametrize("content", ["", "hello", "0" * 39, "\x00" * 40, "é" * 40, "#" * 40, "~" * 40])
def test_a_damaged_key_file_is_refused_and_kept(content: str, tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(TrustError, match="does not hold a secret key"):
        KeyPair.load_or_create(path)
    assert path.read_text() == content


def test_the_device_id_is_the_hash_of_the_public_key() -> None:
    pair = KeyPair.generate()
    assert pair.device_id == device_id(pair.public) == hashlib.sha256(pair.public).digest()[:16].hex()
    assert fingerprint(pair.public).replace("-", "") == pair.device_id


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_keys_survive_being_written_down(key: bytes) -> None:
    assert key_from_text(key_to_text(key)) == key


@settings(deadline=None)
@given(st.text(max_size=60))
def test_other_text_is_not_a_key(text: str) -> None:
    with contextlib.suppress(TrustError):
        assert key_to_text(key_from_text(text)) == text


def test_signatures_hold_for_the_signed_bytes_and_the_signer_only() -> None:
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign(b"data")
    assert verify(key.public, signature, b"data")
    assert not verify(key.public, signature, b"date")
    assert not verify(other.public, signature, b"data")
    assert not verify(key.public, signature[:-1], b"data")
    assert not verify(b"short", signature, b"data")
