"""The manifest: everything about a bundle but the bytes of its slices.

A bundle is a directory: `manifest.json` (canonical JSON), `manifest.sig` (signer's public key and Ed25519 signature
over the manifest's bytes) and `slices/` (files named by their sha256). Tensors and compiled segments lie inside
slices; the embedding, each layer and the head have slices of their own, so that a device fetches only what it runs.

Knows: the shape of the manifest and its invariants. Does not know: files, transfer, keys, execution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_runtime.bundle.operations import Operation
from edge_runtime.core import Digest

FORMAT_VERSION = 1
SLICE_ALIGNMENT_BYTES = (
    4096  # every part of a tensor starts on a page, so that it can be mapped or read directly
)
QUANTIZATION_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Slice:
    """One content-addressed file. sha256 is checked on arrival, BLAKE3 (fast) at every open."""

    digest: Digest
    blake3: str  # 64 hex digits
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """One array inside a slice, C order, little-endian."""

    slice: str  # key in Manifest.slices
    offset_bytes: int
    dtype: str  # numpy name: "float32", "uint8", ...
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """One row of the open table of formats. `bits` is of a weight; block 0 means unquantized."""

    name: str
    bits: int
    block: int
    parts: tuple[str, ...]
    prefix_bits: tuple[int, ...] = ()  # of a weight, of which fewer than all planes are there

    @property
    def planes(self) -> int:
        """Of an expert: runs of pages, each read and checked alone; `plane_of` says which part is in which."""
        return len(self.prefix_bits) + 1


# `int8` and `int4` are MatMulNBits' layouts: data uint8 [out, ceil(in/32), 32*bits/8], zero point 2^(bits-1), low
# nibble first; scales float32 [out, ceil(in/32)]. `experts_*` hold E experts; each part has one more leading
# dimension, and one expert's parts (gate, up, down data, then gate, up, down scales) lie together,
# `expert_stride_bytes` apart. `experts_nested4` is the layout of `edge_kernels.nested`: the parts up to the scales are
# a plane that is usable alone, at 2 bits a weight; on the next page begins the plane that makes it 4, and of
# `experts_nested8` behind that the one that makes it 8.
TENSOR_FORMATS: Mapping[str, TensorFormat] = {
    f.name: f
    for f in (
        TensorFormat("fp32", 32, 0, ("data",)),
        TensorFormat("int8", 8, QUANTIZATION_BLOCK, ("data", "scales")),
        TensorFormat("int4", 4, QUANTIZATION_BLOCK, ("data", "scales")),
        TensorFormat("experts_fp32", 32, 0, ("gate", "up", "down")),
        TensorFormat(
            "experts_int8",
            8,
            QUANTIZATION_BLOCK,
            ("gate", "up", "down", "gate_scales", "up_scales", "down_scales"),
        ),
        TensorFormat(
            "experts_int4",
            4,
            QUANTIZATION_BLOCK,
            ("gate", "up", "down", "gate_scales", "up_scales", "down_scales"),
        ),
        TensorFormat(
            "experts_nested4",
            4,
            QUANTIZATION_BLOCK,
            (
                *("gate", "up", "down", "gate_scales", "up_scales", "down_scales"),
                *("gate_low", "up_low", "down_low"),
            ),
            prefix_bits=(2,),
        ),
        TensorFormat(
            "experts_nested8",
            8,
            QUANTIZATION_BLOCK,
            (
                *("gate", "up", "down", "gate_scales", "up_scales", "down_scales"),
                *("gate_low", "up_low", "down_low", "gate_fine", "up_fine", "down_fine"),
            ),
            prefix_bits=(2, 4),
        ),
    )
}
LOW_PLANE, FINE_PLANE = "_low", "_fine"  # how names of parts in the second plane end, and in the third


def plane_of(part: str) -> int:
    """Which plane of an expert a part of this name is in, from 0."""
    return 2 if part.endswith(FINE_PLANE) else 1 if part.endswith(LOW_PLANE) else 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named weight. `shape` is the logical one: [out, in], [width], or for experts [E, intermediate, hidden].

    For `experts_*`, each Part describes expert 0 (shape without the leading E) and expert e's array starts
    `e * expert_stride_bytes` later in the same slice. An expert's bytes are the `expert_stride_bytes` from the first of
    its parts on; `expert_digests` has the digest (64 hex digits, see `hashing.expert_digest`) of each plane of each
    expert, plane after plane, so that it can be read and checked without the rest of its slice. Old bundles have none.
    """

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    expert_stride_bytes: int = 0
    expert_digests: tuple[str, ...] = ()

    @property
    def is_experts(self) -> bool:
        return self.format.startswith("experts_")

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Of an expert's planes, one behind the other; together they are the stride."""
        starts: dict[int, int] = {}
        for name, part in self.parts.items():
            plane = plane_of(name)
            starts[plane] = min(part.offset_bytes, starts.get(plane, part.offset_bytes))
        ordered = [starts[plane] for plane in sorted(starts)]
        end = ordered[0] + self.expert_stride_bytes
        return tuple(after - start for start, after in zip(ordered, [*ordered[1:], end], strict=True))


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive uncut operations of a block, compiled to one weightless ONNX graph.

    The graph's initializers are external data: `location` is the slice's key, offset and length point at a
    tensor's part.
    The graph's inputs and outputs come in the order of `inputs` and `outputs`; an output may have another name there
    (ONNX names a tensor once, and `hidden` is often both).
    """

    graph: Part  # uint8 bytes of the ModelProto
    first_operation: int
    last_operation: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """The embedding, one layer, or the head: operations, and the segments that cover the uncut ones."""

    name: str  # "embedding", "layers.N", "head"
    operations: tuple[Operation, ...]
    segments: tuple[Segment, ...]
    slices: tuple[str, ...]  # keys of every slice the block needs
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: angle of pair i at position p is p * inverse_frequencies[i]; cos and sin times `scale`.

    Where `len(inverse_frequencies) * 2 < head_dim`, only the first entries of a head are rotated (partial rotary).
    """

    inverse_frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What planners, schedulers and the API need to know without reading a weight."""

    name: str
    family: str
    kind: str  # "generator" or "encoder"
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    kv_bytes_per_token_per_layer: int
    eos_ids: tuple[int, ...]
    bos_id: int  # -1: none
    weights: str  # the --weights choice: fp32, int8, int4, nested4, nested8
    add_bos: bool = False  # the tokenizer's own post-processor adds it; here for display


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole bundle as data. Written once, signed, and never changed."""

    model: ModelInfo
    embedding: Block
    layers: tuple[Block, ...]
    head: Block
    tensors: Mapping[str, Tensor]
    slices: Mapping[str, Slice]  # key (a readable name, "layers.3") -> file
    ropes: Mapping[str, Rope]
    tokenizer: str  # key of the slice that holds tokenizer.json
    chat_template: str  # Jinja source; "" where the model has none
    special_tokens: Mapping[str, str]  # "bos_token" -> "<s>", ... for the template
    quality: Mapping[str, float] = field(
        default_factory=dict
    )  # top1_agreement, perplexity, perplexity_ratio, ...
    origin: str = ""  # where the checkpoint came from
    format_version: int = FORMAT_VERSION

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all distinct slices that hold weights (a tied embedding and head count once)."""
        keys = {key for block in (self.embedding, *self.layers, self.head) for key in block.slices}
        return sum(self.slices[key].size_bytes for key in keys)

    def blocks(self, first: int, last: int) -> tuple[Block, ...]:
        """Blocks of a stage with layers first..last: the first stage embeds, the last has the head."""
        head = (self.head,) if last == self.num_layers - 1 else ()
        return ((self.embedding,) if first == 0 else ()) + self.layers[first : last + 1] + head

    def expert_slices(self, block: Block) -> tuple[str, ...]:
        """Slices of a block that hold its experts and nothing else it uses: they can stay on flash."""
        experts: set[str] = set()
        others = {segment.graph.slice for segment in block.segments}
        for operation in block.operations:
            for name in operation.weights.values():
                tensor = self.tensors[name]
                keys = {part.slice for part in tensor.parts.values()}
                (experts if tensor.is_experts else others).update(keys)
        return tuple(key for key in block.slices if key in experts - others)

    @property
    def prefix_bits(self) -> tuple[int, ...]:
        """With how many bits of a weight some experts are usable before all of theirs are here."""
        return tuple(
            sorted(
                {
                    bits
                    for tensor in self.tensors.values()
                    for bits in TENSOR_FORMATS[tensor.format].prefix_bits
                }
            )
        )

    def stage_weight_bytes(self, first: int, last: int) -> int:
        keys = {key for block in self.blocks(first, last) for key in block.slices}
        return sum(self.slices[key].size_bytes for key in keys)
