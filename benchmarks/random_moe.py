"""A random mixture-of-experts bundle with Qwen3-30B-A3B's depth and number of experts, and narrower ones.

4.5 GB at int4, 4.1 GB in two planes of 2 bits, written in well under a minute: codes are random bytes, and scales keep
values ordinary. Speed does not depend on what they say.

Knows: how to write such a bundle into `.bench/`. Does not know: what is measured with it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edge_kernels.nested import GROUP, PLANE_BYTES, SCALE_BYTES, NestedMatrix
from edge_kernels.quantization import BLOCK
from numpy.typing import NDArray

from benchmarks.checkpoints import CACHE
from benchmarks.report import say
from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import Block, Manifest, ModelInfo, Part, Segment, Tensor
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.bundle.writer import BundleWriter, SliceWriter
from exporters.architectures import plan_model
from exporters.architectures.plan import BlockPlan, ExpertsPlan, ModelPlan, TensorPlan
from exporters.config import Settings
from exporters.experts import nested_arrays, pack
from exporters.graph import compile_segments
from exporters.quantize import format_of

TOKENIZER = Path(__file__).parents[1] / "examples" / "models" / "moe" / "tokenizer.json"
CODE_SPREAD = {"int4": 4.6, "int8": 73.9}  # standard deviation of uniform codes


@dataclass(frozen=True)
class MoeShape:
    """Qwen3-30B-A3B has hidden 2048, intermediate 768, 32 heads and a vocabulary of 151 936."""

    name: str = "moe-48x128"
    layers: int = 48
    experts: int = 128
    top_k: int = 6  # what the recorded trace used
    hidden: int = 1024
    intermediate: int = 384
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 4096
    weights: str = "int4"

    def settings(self) -> Settings:
        return Settings(
            {
                "model_type": "qwen3_moe",
                "hidden_size": self.hidden,
                "intermediate_size": 4 * self.hidden,
                "moe_intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim,
                "num_experts": self.experts,
                "num_experts_per_tok": self.top_k,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "hidden_act": "silu",
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
                "max_position_embeddings": 2048,
                "vocab_size": self.vocab,
                "tie_word_embeddings": True,
                "attention_bias": False,
            }
        )


LARGE = MoeShape()
TINY = MoeShape(
    "moe-tiny", layers=4, experts=128, hidden=64, intermediate=32, heads=2, kv_heads=1, head_dim=32
)


def random_moe(shape: MoeShape) -> Path:
    """Made where it is not there yet."""
    path = CACHE / f"{shape.name}-{shape.weights}"
    if (path / "manifest.sig").exists():
        return path
    say(f"writing {path} (once)")
    shutil.rmtree(path, ignore_errors=True)
    plan = plan_model(shape.settings())
    work = _Writer(plan, shape)
    writer = BundleWriter(path)
    blocks = [work.block(writer, block) for block in plan.blocks]
    writer.add_file("tokenizer", TOKENIZER.read_bytes())
    info = ModelInfo(
        name=shape.name,
        family=plan.family,
        kind=plan.kind,
        hidden_size=plan.hidden_size,
        vocab_size=plan.vocab_size,
        max_context_tokens=plan.max_context_tokens,
        kv_bytes_per_token_per_layer=8 * plan.kv_width,
        eos_ids=(0,),
        bos_id=0,
        weights=shape.weights,
    )
    writer.finish(
        lambda slices: Manifest(
            info,
            blocks[0],
            tuple(blocks[1:-1]),
            blocks[-1],
            work.tensors,
            slices,
            plan.ropes,
            "tokenizer",
            "",
            {},
        ),
        BundleSigningKey(bytes(32)),
    )
    return path


class _Writer:
    def __init__(self, plan: ModelPlan, shape: MoeShape) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._plan = plan
        self._shape = shape
        self._rng = np.random.default_rng(0)

    def block(self, writer: BundleWriter, block: BlockPlan) -> Block:
        for plan in block.tensors:
            if isinstance(plan, ExpertsPlan):
                with writer.slice(f"{block.name}.experts") as out:
                    self.tensors[plan.name] = self._experts(out, plan)
        with writer.slice(block.name) as out:
            for plan in block.tensors:
                if isinstance(plan, TensorPlan):
                    self.tensors[plan.name] = self._tensor(out, plan)
            segments = tuple(
                Segment(out.add(s.model), s.first_operation, s.last_operation, s.inputs, s.outputs)
                for s in compile_segments(block.name, block.operations, self.tensors, self._plan.hidden_size)
            )
        used = {name for operation in block.operations for name in operation.weights.values()}
        keys = {part.slice for name in used for part in self.tensors[name].parts.values()} | {block.name}
        weight_bytes = sum(writer.slices[key].size_bytes for key in keys)
        return Block(block.name, block.operations, segments, tuple(sorted(keys)), weight_bytes)

    def _tensor(self, out: SliceWriter, plan: TensorPlan) -> Tensor:
        format = format_of(plan.role, self._shape.weights)
        if len(plan.shape) == 1:
            return Tensor("fp32", plan.shape, {"data": out.add(np.ones(plan.shape, np.float32))})
        if format == "fp32":
            values = self._rng.standard_normal(plan.shape, np.float32) / np.float32(np.sqrt(plan.shape[1]))
            return Tensor("fp32", plan.shape, {"data": out.add(values)})
        rows, columns = plan.shape
        data, scales = self._matrix(rows, columns, format)
        return Tensor(format, plan.shape, {"data": out.add(data), "scales": out.add(scales)})

    def _matrix(self, rows: int, columns: int, format: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        blocks = -(-columns // 32)
        width = 16 if format == "int4" else 32
        data = np.frombuffer(self._rng.bytes(rows * blocks * width), np.uint8).reshape(rows, blocks, width)
        scale = 1.0 / (CODE_SPREAD[format] * np.sqrt(columns))
        scales = (scale * self._rng.uniform(0.5, 1.5, (rows, blocks))).astype(np.float32)
        return data, scales

    def _experts(self, out: SliceWriter, plan: ExpertsPlan) -> Tensor:
        shapes = {"gate": (plan.intermediate, plan.hidden), "up": (plan.intermediate, plan.hidden)}
        shapes["down"] = (plan.hidden, plan.intermediate)
        parts: dict[str, Part] = {}
        digests: list[str] = []
        stride_bytes = 0
        for _ in range(plan.experts):
            arrays = self._expert(shapes)
            planes, offsets = pack(arrays)
            whole = out.add(np.concatenate(planes))
            if not parts:
                stride_bytes = sum(map(len, planes))
                for name, array in arrays.items():
                    start = whole.offset_bytes + offsets[name]
                    parts[name] = Part(whole.slice, start, str(array.dtype), array.shape)
            digests += [digest_of_expert(plane.data).hex() for plane in planes]
        return Tensor(f"experts_{self._shape.weights}", plan.shape, parts, stride_bytes, tuple(digests))

    def _expert(self, shapes: dict[str, tuple[int, int]]) -> dict[str, NDArray[np.generic]]:
        weights = self._shape.weights
        if weights == "nested4":
            return nested_arrays({name: self._nested(*shape) for name, shape in shapes.items()})
        matrices = {name: self._matrix(*shape, weights) for name, shape in shapes.items()}
        arrays: dict[str, NDArray[np.generic]] = {name: matrix[0] for name, matrix in matrices.items()}
        arrays |= {f"{name}_scales": matrix[1] for name, matrix in matrices.items()}
        return arrays

    def _nested(self, rows: int, columns: int) -> NestedMatrix:
        groups = -(-columns // GROUP)
        shape = (rows, groups, PLANE_BYTES)
        high, low = (
            np.frombuffer(self._rng.bytes(math.prod(shape)), np.uint8).reshape(shape) for _ in range(2)
        )
        scale = 1.0 / (CODE_SPREAD["int4"] * np.sqrt(columns))
        scales = (scale * self._rng.uniform(0.5, 1.5, (rows, groups * GROUP // BLOCK))).astype(np.float32)
        scales[:, -(-columns // BLOCK) :] = 0.0  # padding
        halves = (scales.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return NestedMatrix(high, low, halves.reshape(rows, groups, SCALE_BYTES))
