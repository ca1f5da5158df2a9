"""Files of a hub model, fetched into a directory of their own and resumed where a download stopped.

    HF_HOME/edge-runtime/ORG--MODEL/COMMIT/model.safetensors      whole
    HF_HOME/edge-runtime/ORG--MODEL/COMMIT/model.safetensors.part so far

The hub client's own cache starts a file again from its first byte; ours asks for the bytes that are missing.
Knows: the hub's listing and HTTP ranges. Does not know: which files an export needs.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_runtime.errors import ExportError

_ATTEMPTS = 3  # in a row without a new byte
_HASH_CHUNK_BYTES = 1 << 20

DownloadProgress = Callable[[str, int, int], None]  # (file, bytes done, bytes in all) over all files


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit; size 0 and no hash where the hub does not say."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a revision stands for now."""

    commit: str
    files: tuple[RemoteFile, ...]


def list_files(
    name: str, patterns: Sequence[str], *, revision: str | None = None, endpoint: str | None = None
) -> Listing:
    """The commit behind a revision, and those of its files that match a pattern."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True)
    files = tuple(
        RemoteFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else "")
        for sibling in info.siblings or []
        if any(fnmatch.fnmatch(sibling.rfilename, pattern) for pattern in patterns)
    )
    return Listing(info.sha or "main", files)


def fetch(
    name: str, listing: Listing, root: Path, progress: DownloadProgress, *, endpoint: str | None = None
) -> Path:
    """Bring every file of the listing below `root`; what is there already is kept."""
    directory = root / name.replace("/", "--") / listing.commit
    total = sum(file.size_bytes for file in listing.files)
    finished = 0
    for file in listing.files:
        target = _inside(directory, file.path)

        def advance(done: int, file: RemoteFile = file, before: int = finished) -> None:
            progress(file.path, before + done, total)

        if not target.exists():
            _fetch_file(name, listing.commit, file, target, advance, endpoint)
        finished += file.size_bytes
        advance(file.size_bytes)
    return directory


def _inside(directory: Path, path: str) -> Path:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise ExportError(f"the hub lists the file {path!r}", hint="do not trust this hub")
    return directory / parts


def _fetch_file(
    name: str,
    commit: str,
    file: RemoteFile,
    target: Path,
    advance: Callable[[int], None],
    endpoint: str | None,
) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    url = hf_hub_url(name, file.path, revision=commit, endpoint=endpoint)
    remote = get_hf_file_metadata(url, endpoint=endpoint)
    size_bytes = file.size_bytes or remote.size or 0
    failures = 0
    while _size(part) < size_bytes or not part.exists():
        before, lost = _size(part), None
        try:
            for done in _append(remote.location, url, part):
                advance(done)
        except OSError:
            raise  # the hub answered with an error, or the disk is full
        except Exception as error:  # the HTTP library's own: the connection was lost
            lost = error
        failures = 0 if _size(part) > before else failures + 1
        if failures == _ATTEMPTS:
            raise lost or ExportError(f"the hub sends nothing more of {file.path}", hint="try again later")
    _check(part, size_bytes, file)
    part.rename(target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(location: str, hub_url: str, part: Path) -> Iterator[int]:
    """Ask for what is missing and write it as it comes; yields the size so far."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # re-exported without saying so
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    done = _size(part)
    headers: dict[str, Any] = build_hf_headers() if _same_host(location, hub_url) else {}
    headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with get_session().stream("GET", location, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        resumed = response.status_code == 206
        with part.open("ab" if resumed else "wb") as file:
            done = done if resumed else 0
            for chunk in response.iter_bytes():
                file.write(chunk)
                file.flush()  # what has come is kept, whatever ends this process
                done += len(chunk)
                yield done


def _same_host(location: str, hub_url: str) -> bool:
    """The user's token is for the hub alone, not for where it keeps large files."""
    from urllib.parse import urlsplit

    return urlsplit(location).netloc == urlsplit(hub_url).netloc


def _check(part: Path, size_bytes: int, file: RemoteFile) -> None:
    digest = hashlib.sha256()
    with part.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    found = part.stat().st_size
    if (size_bytes and found != size_bytes) or (file.sha256 and digest.hexdigest() != file.sha256):
        part.unlink()
        raise ExportError(
            f"{file.path} came with {found} bytes that are not those the hub promised ({size_bytes})",
            hint="run the same command again: the file will be fetched from its beginning",
        )
