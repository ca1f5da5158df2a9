"""A Hugging Face checkpoint directory: config.json, tokenizer files and safetensors, single or sharded.

Tensors are read from the file a few rows at a time, as float32: nothing larger than what the caller asked for is ever
in memory. Knows: files and dtypes. Does not know: architectures. Never opens a pickle and never runs code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from exporters.safetensors_header import DTYPE_BYTES, StoredTensor, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_JSON_BYTES = 64 << 20
CHUNK_BYTES = 32 << 20  # of float32; what one step of a streamed tensor holds
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Floats = NDArray[np.float32]


class Checkpoint:
    """Names and shapes of every tensor, and their values on request."""

    def __init__(self, path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Raises ExportError: not a checkpoint, a pickle, or a damaged file."""
        path = Path(path)
        if not path.is_dir():
            raise ExportError(
                f"{path} is not a directory",
                hint="give a directory with config.json and model.safetensors, or a hub name like org/model",
            )
        config = read_json(path / "config.json")
        if config is None:
            raise ExportError(
                f"{path} has no config.json", hint="point at the directory save_pretrained() wrote"
            )
        return cls(path, config, _tensors(path))

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the directory; None where the file is missing."""
        return read_json(self.path / name)

    def bytes(self, name: str) -> bytes | None:
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def find(self, *names: str) -> str | None:
        """The first of these names that is a tensor here."""
        return next((name for name in names if name in self.tensors), None)

    def require(self, names: tuple[str, ...], shape: tuple[int, ...]) -> StoredTensor:
        """The first of `names` that exists, with that shape. Raises ExportError with what was expected and found."""
        name = self.find(*names)
        if name is None:
            raise ExportError(
                f"tensor {names[0]} of shape {list(shape)} is missing from {self.path}",
                hint=_spelling_hint(names, self.tensors),
            )
        stored = self.tensors[name]
        if stored.shape != shape:
            raise ExportError(
                f"tensor {name} in {stored.path.name} has shape {list(stored.shape)}, "
                f"but config.json calls for {list(shape)}",
                hint="config.json and the weights are of different models; download both again",
            )
        return stored

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> Floats:
        """Rows (of the first axis) of a tensor as float32."""
        stored = self.tensors[name]
        total_rows = stored.shape[0] if stored.shape else 1
        rows = total_rows - first_row if rows is None else rows
        shape = (rows, *stored.shape[1:])
        row_bytes = stored.size_bytes // max(total_rows, 1)
        raw = np.empty(rows * row_bytes, np.uint8)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset_bytes + first_row * row_bytes)
            filled = 0
            while filled < len(raw):
                count = file.readinto(raw[filled:].data)
                if not count:
                    raise ExportError(f"{stored.path} ended inside tensor {name}", hint="download it again")
                filled += count
        return _to_float32(raw, stored).reshape(shape)

    def chunks(self, name: str, first_row: int = 0, rows: int | None = None) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) pairs that cover a tensor in order, each about CHUNK_BYTES as float32."""
        stored = self.tensors[name]
        rows = stored.shape[0] - first_row if rows is None else rows
        step = max(1, CHUNK_BYTES // max(1, 4 * math.prod(stored.shape[1:])))
        for start in range(first_row, first_row + rows, step):
            yield start - first_row, self.read(name, start, min(step, first_row + rows - start))


def read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ExportError(f"{path} is too large to be what its name says", hint="download it again")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ExportError(f"{path} is not a JSON object", hint="download it again")
    return value


def _tensors(path: Path) -> dict[str, StoredTensor]:
    if (path / INDEX_FILE).is_file():
        return _sharded(path)
    if (path / SINGLE_FILE).is_file():
        return read_header(path / SINGLE_FILE)
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ExportError(
            f"{path / pickles[0]} is a pickle, which can run code when it is read",
            hint="convert it with transformers: model.save_pretrained(directory, safe_serialization=True)",
        )
    raise ExportError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}",
        hint="only safetensors checkpoints are read; download the whole checkpoint",
    )


def _sharded(path: Path) -> dict[str, StoredTensor]:
    index = read_json(path / INDEX_FILE) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ExportError(f"{path / INDEX_FILE} has no weight_map", hint="download it again")
    headers = {shard: read_header(_shard_path(path, shard)) for shard in sorted(set(weight_map.values()))}
    tensors: dict[str, StoredTensor] = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ExportError(
                f"{INDEX_FILE} says that tensor {name} is in {shard}, but it is not",
                hint="download the checkpoint again: its files belong to different versions",
            )
        tensors[name] = headers[shard][name]
    return tensors


def _shard_path(path: Path, shard: str) -> Path:
    """Shards lie beside their index: a name with a directory in it could point anywhere."""
    if shard != Path(shard).name or not shard.endswith(".safetensors"):
        raise ExportError(
            f"{INDEX_FILE} names the shard {shard!r}, which is not a safetensors file beside it",
            hint="do not trust this checkpoint; get it from its publisher",
        )
    if not (path / shard).is_file():
        raise ExportError(f"shard {path / shard} is missing", hint="download the whole checkpoint")
    return path / shard


def _to_float32(raw: NDArray[np.uint8], stored: StoredTensor) -> Floats:
    match stored.dtype:
        case "F32":
            return raw.view("<f4")
        case "F16":
            return raw.view("<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            wide = np.zeros(len(raw) // DTYPE_BYTES["BF16"], np.uint32)
            np.left_shift(raw.view("<u2"), 16, out=wide, dtype=np.uint32)
            return wide.view(np.float32)
    raise ExportError(
        f"tensor {stored.name} in {stored.path.name} is {stored.dtype}; only F32, F16 and BF16 are read",
        hint="use the unquantized checkpoint of this model",
    )


def _spelling_hint(names: tuple[str, ...], tensors: Mapping[str, StoredTensor]) -> str:
    tail = names[0].rsplit(".", 2)[-2:]
    close = sorted(name for name in tensors if name.endswith(".".join(tail)))[:1]
    if close:
        return f"the checkpoint has {close[0]}; is config.json from the same model?"
    return f"the checkpoint has {len(tensors)} tensors; download it again if a file is missing"
