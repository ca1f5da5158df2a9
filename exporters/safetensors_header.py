"""The header of a safetensors file, checked before any byte it points at is used.

Layout: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape, data_offsets), then data.
Knows: what a well-formed header is. Does not know: which tensors a model needs, how values are converted.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from edge_runtime.errors import ExportError

MAX_HEADER_BYTES = 4 << 20
_LENGTH_BYTES = 8
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes are."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    size_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises ExportError naming the file (and the tensor) that is wrong."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_bytes < _LENGTH_BYTES or not 2 <= header_bytes <= file_bytes - _LENGTH_BYTES:
            raise _damaged(path, f"its header length is {header_bytes} in a file of {file_bytes} bytes")
        if header_bytes > MAX_HEADER_BYTES:
            raise _damaged(
                path, f"its header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}"
            )
        header = _parse(path, file.read(header_bytes))
    data_start = _LENGTH_BYTES + header_bytes
    tensors = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    _check_coverage(path, tensors, data_start, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def _parse(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _damaged(path, "a name occurs twice in its header")
        return result

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    return header


def _tensor(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of tensor {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has a bad shape or bad offsets")
    begin, end = offsets
    expected_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected_bytes:
        raise _damaged(
            path,
            f"tensor {name!r} of {dtype} {list(shape)} needs {expected_bytes} bytes but has {end - begin}",
        )
    return StoredTensor(name, path, dtype, tuple(shape), data_start + begin, expected_bytes)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(path: Path, tensors: list[StoredTensor], data_start: int, file_bytes: int) -> None:
    """In order of offset the tensors must touch, without holes or overlaps, and end where the file ends."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset_bytes, t.size_bytes)):
        if tensor.offset_bytes != position:
            kind = "overlaps another" if tensor.offset_bytes < position else "leaves a hole before it"
            raise _damaged(path, f"tensor {tensor.name!r} {kind}")
        position += tensor.size_bytes
    if position != file_bytes:
        raise _damaged(path, f"its tensors end at byte {position} of {file_bytes}")


def _damaged(path: Path, why: str) -> ExportError:
    return ExportError(
        f"{path} is not a sound safetensors file: {why}",
        hint="download the checkpoint again; the file is cut short or was made by a broken tool",
    )
