"""What every journal refuses, whatever it is stored in.

Knows: the entries' rules and their sentences. Does not know: storage.
"""

from __future__ import annotations

from coordinator.journal.base import DeviceEntry
from edge_runtime.core import RequestId
from edge_runtime.errors import TrustError, UsageError


def check_device(new: DeviceEntry, old: DeviceEntry | None) -> None:
    """A revoked key stays revoked, and an id belongs to one key for ever."""
    if old is None:
        return
    if old.public_key != new.public_key:
        raise TrustError(f"device {new.device_id} is known with another public key")
    if old.revoked and not new.revoked:
        raise TrustError(
            f"device {old.name!r} ({old.device_id}) was revoked",
            hint="delete its key file on the device, then pair it again: it gets a new id",
            code="revoked",
        )


def check_first_index(request: RequestId, first_index: int, held: int) -> None:
    """Tokens may repeat what is held, never leave a hole."""
    if not 0 <= first_index <= held:
        raise UsageError(f"request {request}: token {first_index} can't follow {held} journalled ones")


def check_rebind(request: RequestId, held: int) -> None:
    if held:
        raise UsageError(f"request {request} has {held} tokens of its numeric classes already")


def no_device(device_id: str) -> UsageError:
    return UsageError(f"there is no device {device_id!r}", hint="`edge-runtime devices` lists them")


def no_request(request: RequestId) -> UsageError:
    return UsageError(f"there is no request {request!r} in the journal", code="unknown_request")


def duplicate_request(request: RequestId) -> UsageError:
    return UsageError(f"request {request!r} is journalled already")
