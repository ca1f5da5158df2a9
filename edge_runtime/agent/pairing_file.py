"""The pairing a device keeps: written once, readable by its owner only.

Knows: the file. Does not know: how a device is paired.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from edge_runtime.core import DeviceId
from edge_runtime.errors import ConfigError
from edge_runtime.trust.pairing import Pairing

PAIRING_FILE = "pairing.json"


def save_pairing(directory: Path, pairing: Pairing) -> None:
    """Whole or not at all: a device that lost power while pairing pairs again."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = directory / f".{PAIRING_FILE}"
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(
            {
                "device_id": pairing.device_id,
                "coordinator_address": pairing.coordinator_address,
                "server_key": pairing.server_key.hex(),
                "signing_key": pairing.signing_key.hex(),
            },
            file,
            indent=1,
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / PAIRING_FILE)


def load_pairing(directory: Path) -> Pairing | None:
    """None where the device was never paired. Raises ConfigError where the file is damaged."""
    path = directory / PAIRING_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(text)
        return Pairing(
            DeviceId(str(fields["device_id"])),
            str(fields["coordinator_address"]),
            bytes.fromhex(fields["server_key"]),
            bytes.fromhex(fields["signing_key"]),
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise ConfigError(
            f"{path} is damaged: {problem!r}", hint=f"delete {path} and pair again with a fresh join link"
        ) from problem
