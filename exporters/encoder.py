"""What sentence encoders need beyond the architecture: how rows become one vector.

sentence-transformers writes `modules.json` (the chain) and a `config.json` in the pooling module's directory.
Knows: those files. Does not know: tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from edge_runtime.errors import ExportError
from exporters.checkpoint import Checkpoint

_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class Pooling:
    """Mean over the rows and unit length, unless the checkpoint says otherwise."""

    mode: str = "mean"
    normalize: bool = True


def read_pooling(checkpoint: Checkpoint) -> Pooling:
    """Raises ExportError for a pooling or a module that is not supported (it would change every vector)."""
    modules = _modules(checkpoint)
    if modules is None:
        return Pooling()
    mode, normalize = "mean", False
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _mode(checkpoint, str(module.get("path", "")))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ExportError(
                f"modules.json: the module {kind[:40]!r} is not supported",
                hint="export an encoder with Transformer, Pooling and Normalize modules only",
            )
    return Pooling(mode, normalize)


def _modules(checkpoint: Checkpoint) -> list[dict[str, Any]] | None:
    data = checkpoint.bytes("modules.json")
    if data is None:
        return None
    try:
        modules = json.loads(data)
    except (ValueError, RecursionError):
        modules = None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ExportError(
            f"{checkpoint.path / 'modules.json'} is not a list of modules", hint="download it again"
        )
    return modules


def _mode(checkpoint: Checkpoint, directory: str) -> str:
    place = PurePosixPath(directory)
    if place.is_absolute() or ".." in place.parts:
        raise ExportError(
            f"modules.json names the directory {directory!r}", hint="do not trust this checkpoint"
        )
    config = checkpoint.json(f"{place}/config.json") or {}
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in config:  # the newer spelling: one name, or several joined by "+"
        chosen = [f"pooling_mode_{config['pooling_mode']}", f"pooling_mode_{config['pooling_mode']}_tokens"]
        chosen = [key for key in chosen if key in _MODES] or ["pooling_mode_cls_token"] * (
            config["pooling_mode"] == "cls"
        )
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ExportError(
            f"{directory}/config.json: only mean and cls pooling are supported, not {chosen}",
            hint="export another encoder",
        )
    return _MODES[chosen[0]]
