"""Where the experts of a stage lie on flash, and what each must hash to.

Knows: the expert tensors of a bundle's layers. Does not know: reading, caches, routing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import TENSOR_FORMATS, Block, Manifest, Tensor
from edge_runtime.errors import BundleError


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one operation: expert e is `stride_bytes` of a slice, from `first_byte + e * stride_bytes` on."""

    tensor: str
    layer: int  # of the model
    slice: str
    path: Path
    first_byte: int
    stride_bytes: int
    experts: int
    hidden: int
    intermediate: int
    format: str  # fp32, int8, int4, nested4, nested8
    offsets: Mapping[str, int]  # of the parts, inside an expert
    digests: Sequence[bytes]  # of every plane of every expert, plane after plane
    top_k: int
    plane_bytes: tuple[int, ...]  # one behind the other; together the stride

    def __str__(self) -> str:
        return f"layer {self.layer}"

    @property
    def total_bytes(self) -> int:
        return self.experts * self.stride_bytes

    @property
    def token_bytes(self) -> int:
        """What one token needs of this layer."""
        return self.top_k * self.stride_bytes

    @property
    def planes(self) -> int:
        return len(self.plane_bytes)

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Of a weight, with the first plane, the first two, …"""
        form = TENSOR_FORMATS[f"experts_{self.format}"]
        return *form.prefix_bits, form.bits

    def offset(self, expert: int, plane: int = 0) -> int:
        return self.first_byte + expert * self.stride_bytes + self.plane_start(plane)

    def plane_start(self, plane: int) -> int:
        """Inside an expert; of the plane after the last: where it ends."""
        return sum(self.plane_bytes[:plane])

    def digest(self, expert: int, plane: int) -> bytes:
        return self.digests[expert * self.planes + plane]

    def is_right(self, expert: int, data: bytes | memoryview) -> bool:
        """Whether these are the signed bytes of the expert, all planes of them."""
        view = memoryview(data).cast("B")
        return len(view) == self.stride_bytes and all(
            digest_of_expert(view[self.plane_start(plane) : self.plane_start(plane + 1)])
            == self.digest(expert, plane)
            for plane in range(self.planes)
        )


def expert_layers(bundle: Bundle, blocks: Iterable[Block], *, files: bool = True) -> tuple[ExpertLayer, ...]:
    """In the order of the blocks. Raises BundleError: no digests (an old bundle), a slice missing or cut short.

    Without `files` nothing needs to be on flash yet.
    """
    found = []
    for block in blocks:
        for operation in block.operations:
            if operation.kind != "experts":
                continue
            name = operation.weights["experts"]
            tensor = bundle.manifest.tensors[name]
            layer = int(block.name.rpartition(".")[2])
            found.append(_layer(bundle, name, tensor, layer, int(operation.attributes["top_k"])))
    for layer_found in found if files else ():
        _check_file(bundle, layer_found)
    return tuple(found)


def expert_bytes(manifest: Manifest, first: int, last: int) -> int:
    """Of all experts that can stay on flash, in layers first..last."""
    blocks = manifest.layers[first : last + 1]
    return sum(manifest.slices[key].size_bytes for block in blocks for key in manifest.expert_slices(block))


def can_stay_on_flash(manifest: Manifest, first: int, last: int) -> bool:
    """Whether the bundle has a digest of every single expert in layers first..last."""
    tensors = [
        manifest.tensors[name]
        for block in manifest.layers[first : last + 1]
        for operation in block.operations
        if operation.kind == "experts"
        for name in operation.weights.values()
    ]
    return all(tensor.expert_digests for tensor in tensors)


def shareable_experts(manifest: Manifest, layer: int) -> int:
    """How many experts of a layer several devices may share; 0: none, or no digest of every single one."""
    if not expert_bytes(manifest, layer, layer) or not can_stay_on_flash(manifest, layer, layer):
        return 0
    operations = [o for o in manifest.layers[layer].operations if o.kind == "experts"]
    return sum(int(operation.attributes["experts"]) for operation in operations)


def token_cycle_bytes(manifest: Manifest, first: int, last: int) -> int:
    """The experts that one token uses in layers first..last: a cache below it can't hold on to anything."""
    return sum(
        int(operation.attributes["top_k"])
        * manifest.tensors[operation.weights["experts"]].expert_stride_bytes
        for block in manifest.layers[first : last + 1]
        for operation in block.operations
        if operation.kind == "experts"
    )


def _layer(bundle: Bundle, name: str, tensor: Tensor, layer: int, top_k: int) -> ExpertLayer:
    if not tensor.expert_digests:
        raise BundleError(
            f"the experts of layer {layer} can't stay on flash: the bundle has no digests of single experts",
            hint="export the model again with this version, or use --expert-cache all",
        )
    key = next(iter(tensor.parts.values())).slice
    experts, intermediate, hidden = tensor.shape
    first_byte = min(part.offset_bytes for part in tensor.parts.values())
    return ExpertLayer(
        tensor=name,
        layer=layer,
        slice=key,
        path=bundle.slice_path(key),
        first_byte=first_byte,
        stride_bytes=tensor.expert_stride_bytes,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        format=tensor.format.removeprefix("experts_"),
        offsets={part: at.offset_bytes - first_byte for part, at in tensor.parts.items()},
        digests=tuple(bytes.fromhex(digest) for digest in tensor.expert_digests),
        top_k=top_k,
        plane_bytes=tensor.plane_bytes,
    )


def _check_file(bundle: Bundle, layer: ExpertLayer) -> None:
    wanted_bytes = bundle.manifest.slices[layer.slice].size_bytes
    try:
        here_bytes = layer.path.stat().st_size
    except FileNotFoundError:
        raise BundleError(
            f"slice {layer.slice} of {bundle.path} is missing", hint="fetch or export the bundle again"
        ) from None
    if here_bytes != wanted_bytes:
        raise BundleError(
            f"slice {layer.slice} has {here_bytes} bytes on flash, the manifest says {wanted_bytes}",
            hint=f"delete {layer.path} and fetch or export it again",
        )
