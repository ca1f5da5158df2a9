"""A checkpoint by name: a local directory as it is, or a hub model, downloaded once.

The hub's address, token and home directory are those of `huggingface_hub` (HF_ENDPOINT, HF_TOKEN, HF_HOME).
Knows: names and which files are needed. Does not know: what is in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ExportError, UsageError
from exporters.hub_download import DownloadProgress, fetch, list_files

# No pickles, no code, no second copy of the weights in another layout.
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "*_Pooling/config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class LocatedCheckpoint:
    """Where a checkpoint lies, and what to call what comes out of it."""

    path: Path
    name: str
    origin: str


def locate(
    name: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    progress: DownloadProgress = lambda what, done, total: None,
) -> LocatedCheckpoint:
    """A directory or a hub name like "org/model". Raises UsageError (neither) or ExportError (the download)."""
    directory = Path(name)
    if directory.is_dir():
        return LocatedCheckpoint(directory, directory.resolve().name, directory.resolve().name)
    if directory.exists() or not _HUB_NAME.fullmatch(name):
        raise UsageError(
            f"{name} is neither a directory nor a hub name",
            hint="give a directory with config.json and model.safetensors, or a hub name like org/model",
        )
    path = _download(name, revision, endpoint, progress)
    return LocatedCheckpoint(path, name.rpartition("/")[2], f"{name}@{path.name}")


def _download(name: str, revision: str | None, endpoint: str | None, progress: DownloadProgress) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        listing = list_files(name, NEEDED_FILES, revision=revision, endpoint=endpoint)
        root = Path(constants.HF_HOME) / "edge-runtime"
        return fetch(name, listing, root, progress, endpoint=endpoint)
    except ExportError:
        raise
    except GatedRepoError:
        raise ExportError(
            f"the hub lets only accepted users download {name}",
            hint="accept the model's licence on its page, then: huggingface-cli login",
        ) from None
    except RepositoryNotFoundError:
        raise ExportError(
            f"the hub has no model {name}",
            hint="check the spelling; a private model needs: huggingface-cli login",
        ) from None
    except RevisionNotFoundError:
        raise ExportError(f"{name} has no revision {revision}", hint="check the model's page") from None
    except Exception as error:  # the hub client's errors and its HTTP library's have no common base
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"the download of {name} stopped: {reason}",
            hint="run the same command again: it goes on where it stopped",
        ) from error
