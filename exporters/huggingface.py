"""A checkpoint by name: a local directory as it is, or a hub model downloaded into Hugging Face's own cache.

The hub's address, cache and token are those of `huggingface_hub` (HF_ENDPOINT, HF_HOME, HF_TOKEN). A download that
stopped goes on where it stopped. Knows: names and which files are needed. Does not know: what is in them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ExportError, UsageError

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


def locate(name: str, *, revision: str | None = None, endpoint: str | None = None) -> LocatedCheckpoint:
    """A directory or a hub name like "org/model". Raises UsageError (neither) or ExportError (the download)."""
    directory = Path(name)
    if directory.is_dir():
        return LocatedCheckpoint(directory, directory.resolve().name, directory.resolve().name)
    if directory.exists() or not _HUB_NAME.fullmatch(name):
        raise UsageError(
            f"{name} is neither a directory nor a hub name",
            hint="give a directory with config.json and model.safetensors, or a hub name like org/model",
        )
    path = download(name, revision=revision, endpoint=endpoint)
    return LocatedCheckpoint(path, name.rpartition("/")[2], f"{name}@{path.name}")


def download(name: str, *, revision: str | None = None, endpoint: str | None = None) -> Path:
    """Fetch the needed files, or find them in the cache; progress goes to stderr."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, endpoint=endpoint, allow_patterns=list(NEEDED_FILES))
        )
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
