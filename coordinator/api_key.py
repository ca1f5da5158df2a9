"""The API key of a coordinator's owner: made at the first start, shown to its owner, kept by others as a hash.

Knows: the key's file (0600) and its hash in the journal. Does not know: HTTP, other keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.api.keys import ApiKey, new_secret
from coordinator.journal.base import Journal
from edge_runtime.errors import ConfigError

KEY_FILE = "api.key"
JOURNAL_NAME = "api_key_sha256"
MAX_FILE_BYTES = 4096


async def load_or_create(state_directory: Path, given: Path | None, journal: Journal) -> tuple[str, ApiKey]:
    """(the secret, the key). `given` is a file of the owner's; without one, the state directory's is used."""
    path = given or state_directory / KEY_FILE
    if given is None and not path.exists():
        _write(path, new_secret())
    secret = _read(path)
    key = ApiKey.of(secret)
    if await journal.secret(JOURNAL_NAME) != key.secret_sha256:
        await journal.set_secret(JOURNAL_NAME, key.secret_sha256)
    return secret, key


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"the API key file {path} can't be read: {error.strerror}") from None
    try:
        return data.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} does not hold an API key", hint="one line of printable ASCII") from None


def _write(path: Path, secret: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
