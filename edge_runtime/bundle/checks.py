"""What must hold between the parts of a manifest before anything in it is used.

Knows: references, bounds and sizes. Does not know: files. Every check here guards a place where an executor would
otherwise trust a number it read.
"""

from __future__ import annotations

import math
import re

import numpy as np

from edge_runtime.bundle.hashing import digest_hex
from edge_runtime.bundle.manifest import (
    FORMAT_VERSION,
    SLICE_ALIGNMENT_BYTES,
    TENSOR_FORMATS,
    Block,
    Manifest,
    Part,
    Tensor,
    plane_of,
)
from edge_runtime.errors import BundleError

_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_BLAKE3 = re.compile(r"[0-9a-f]{64}")
_DTYPES = frozenset({"float32", "uint8"})
_KINDS = frozenset({"generator", "encoder"})


def check_manifest(manifest: Manifest) -> None:
    """Raises BundleError that names the block, tensor or slice."""
    if manifest.format_version != FORMAT_VERSION:
        raise BundleError(
            f"the bundle has format {manifest.format_version}, this edge-runtime reads {FORMAT_VERSION}",
            hint="export the model again with this version",
        )
    if not manifest.layers or manifest.model.kind not in _KINDS:
        raise BundleError("the bundle has no layers or an unknown kind of model")
    for key, entry in manifest.slices.items():
        if not _KEY.fullmatch(key):
            raise BundleError(f"{key[:80]!r} is not a slice name")
        digest_hex(entry.digest)
        if entry.size_bytes < 0:
            raise BundleError(f"slice {key} has a negative size")
    for name, tensor in manifest.tensors.items():
        _check_tensor(manifest, name, tensor)
    for block in (manifest.embedding, *manifest.layers, manifest.head):
        _check_block(manifest, block)
    if manifest.tokenizer not in manifest.slices:
        raise BundleError(f"the tokenizer's slice {manifest.tokenizer!r} is missing")


def _check_tensor(manifest: Manifest, name: str, tensor: Tensor) -> None:
    form = TENSOR_FORMATS.get(tensor.format)
    if form is None:
        raise BundleError(
            f"tensor {name} has the unknown format {tensor.format!r}",
            hint="update edge-runtime on this device",
        )
    if tensor.parts.keys() != set(form.parts):
        raise BundleError(f"tensor {name}: {tensor.format} has the parts {', '.join(form.parts)}")
    copies = tensor.shape[0] if tensor.is_experts else 1
    if copies < 1 or (copies > 1 and tensor.expert_stride_bytes <= 0):
        raise BundleError(f"tensor {name} needs an expert stride")
    for part in tensor.parts.values():
        _check_part(manifest, f"tensor {name}", part, (copies - 1) * tensor.expert_stride_bytes)
    if tensor.expert_digests:
        _check_experts(manifest, name, tensor)


def _check_experts(manifest: Manifest, name: str, tensor: Tensor) -> None:
    """Experts that are read one by one lie on pages, in one slice, and inside it."""
    planes = TENSOR_FORMATS[tensor.format].planes
    if len(tensor.expert_digests) != planes * tensor.shape[0] or not tensor.is_experts:
        raise BundleError(f"tensor {name} has {len(tensor.expert_digests)} expert digests")
    if not all(_BLAKE3.fullmatch(digest) for digest in tensor.expert_digests):
        raise BundleError(f"tensor {name} has an expert digest that is not a BLAKE3")
    first_byte = min(part.offset_bytes for part in tensor.parts.values())
    stride_bytes = tensor.expert_stride_bytes
    if (first_byte | stride_bytes) % SLICE_ALIGNMENT_BYTES:
        raise BundleError(f"tensor {name}: experts don't start on pages")
    if planes > 1:
        _check_planes(name, tensor)
    keys = {part.slice for part in tensor.parts.values()}
    if len(keys) != 1 or first_byte + tensor.shape[0] * stride_bytes > max(
        manifest.slices[key].size_bytes for key in keys
    ):
        raise BundleError(f"tensor {name}: experts are not all inside one slice")


def _check_planes(name: str, tensor: Tensor) -> None:
    """A plane is whole pages, and each part lies inside its own: an expert must not run on bytes nobody read."""
    first_byte = min(part.offset_bytes for part in tensor.parts.values())
    sizes = tensor.plane_bytes
    if any(size <= 0 or size % SLICE_ALIGNMENT_BYTES for size in sizes):
        raise BundleError(f"tensor {name}: planes don't start on pages")
    for part_name, part in tensor.parts.items():
        end = sum(sizes[: plane_of(part_name) + 1])
        if part.offset_bytes - first_byte + _size_bytes(part) > end:
            raise BundleError(f"tensor {name}: {part_name} reaches beyond its plane")


def _size_bytes(part: Part) -> int:
    return math.prod(part.shape) * np.dtype(part.dtype).itemsize


def _check_part(manifest: Manifest, owner: str, part: Part, last_copy_bytes: int = 0) -> None:
    entry = manifest.slices.get(part.slice)
    if entry is None:
        raise BundleError(f"{owner} lies in the unknown slice {part.slice!r}")
    if part.dtype not in _DTYPES or any(side < 0 for side in part.shape) or part.offset_bytes < 0:
        raise BundleError(f"{owner} has a bad dtype, shape or offset")
    if part.offset_bytes + last_copy_bytes + _size_bytes(part) > entry.size_bytes:
        raise BundleError(f"{owner} reaches beyond the end of slice {part.slice}")


def _check_block(manifest: Manifest, block: Block) -> None:
    if missing := [key for key in block.slices if key not in manifest.slices]:
        raise BundleError(f"block {block.name} needs the unknown slice {missing[0]!r}")
    for operation in block.operations:
        for name in operation.weights.values():
            tensor = manifest.tensors.get(name)
            if tensor is None:
                raise BundleError(f"{operation.name} uses the unknown tensor {name!r}")
            if any(part.slice not in block.slices for part in tensor.parts.values()):
                raise BundleError(f"{operation.name} uses {name}, which lies outside the block's slices")
        rope = operation.attributes.get("rope")
        if rope and rope not in manifest.ropes:
            raise BundleError(f"{operation.name} uses the unknown rope {rope!r}")
    expected = _uncut_runs(block)
    found = [(segment.first_operation, segment.last_operation) for segment in block.segments]
    if found != expected:
        raise BundleError(
            f"block {block.name}: segments {found} do not cover the uncut operations {expected}"
        )
    for segment in block.segments:
        _check_part(manifest, f"a segment of {block.name}", segment.graph)


def _uncut_runs(block: Block) -> list[tuple[int, int]]:
    """First and last index of every maximal run of uncut operations."""
    runs: list[tuple[int, int]] = []
    for index, operation in enumerate(block.operations):
        if operation.is_cut:
            continue
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
