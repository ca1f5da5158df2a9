"""Small random bundles, made by hand: every operation kind, in any tensor format, without a checkpoint or an exporter.

Segment graphs come from `segment_graphs.py`, written apart from the exporter's, so that the two check each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from edge_kernels.nested import quantize_nested
from edge_kernels.quantization import quantize
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.hashing import digest_of_expert
from edge_runtime.bundle.manifest import (
    SLICE_ALIGNMENT_BYTES,
    Block,
    Manifest,
    ModelInfo,
    Part,
    Rope,
    Segment,
    Tensor,
)
from edge_runtime.bundle.operations import Operation
from edge_runtime.bundle.signing import BundleSigningKey
from edge_runtime.bundle.writer import BundleWriter, SliceWriter
from tests.support.segment_graphs import segment_graph

PAGE_BYTES = SLICE_ALIGNMENT_BYTES
SIGNING_KEY = BundleSigningKey(bytes(range(32)))


@dataclass(frozen=True)
class TinyModel:
    layers: int = 3
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 200
    experts: int = 0
    top_k: int = 2
    format: str = "fp32"
    kind: str = "generator"
    window: int = 0
    softcap: float = 0.0
    qk_norm: bool = True
    softmax_after: bool = False
    max_context: int = 512
    seed: int = 0


@dataclass
class _Writer:
    model: TinyModel
    rng: np.random.Generator
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def matrix(self, out: SliceWriter, name: str, rows: int, columns: int, format: str = "") -> str:
        weights = (self.rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        format = format or self.model.format.replace("nested", "int")
        if format == "fp32":
            parts = {"data": out.add(weights)}
        else:
            quantized = quantize(weights, format)
            parts = {"data": out.add(quantized.data), "scales": out.add(quantized.scales)}
        self.tensors[name] = Tensor(format, (rows, columns), parts)
        return name

    def vector(self, out: SliceWriter, name: str, width: int, around: float = 1.0) -> str:
        values = (around + 0.1 * self.rng.standard_normal(width)).astype(np.float32)
        self.tensors[name] = Tensor("fp32", (width,), {"data": out.add(values)})
        return name

    def experts(self, out: SliceWriter, name: str) -> str:
        m = self.model
        shapes = {"gate": (m.intermediate, m.hidden), "up": (m.intermediate, m.hidden)}
        shapes["down"] = (m.hidden, m.intermediate)
        first: dict[str, Part] = {}
        digests: list[str] = []
        for expert in range(m.experts):
            arrays: dict[str, NDArray[np.generic]] = {}
            scales: dict[str, NDArray[np.generic]] = {}
            low: dict[str, NDArray[np.generic]] = {}
            fine: dict[str, NDArray[np.generic]] = {}
            for part, shape in shapes.items():
                weights = (self.rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
                if m.format == "fp32":
                    arrays[part] = weights
                elif m.format in ("nested4", "nested8"):
                    nested = quantize_nested(weights, bits=int(m.format[-1]))
                    arrays[part], scales[f"{part}_scales"] = nested.high, nested.scales
                    low[f"{part}_low"] = nested.low
                    if nested.fine is not None:
                        fine[f"{part}_fine"] = nested.fine
                else:
                    quantized = quantize(weights, m.format)
                    arrays[part], scales[f"{part}_scales"] = quantized.data, quantized.scales
            arrays |= scales
            planes = [_padded(plane) for plane in (arrays, low, fine) if plane]
            arrays |= low | fine
            digests += [digest_of_expert(plane).hex() for plane in planes]
            packed = b"".join(planes)
            whole = out.add(packed)
            if expert == 0:
                offset = whole.offset_bytes
                for part, array in arrays.items():
                    first[part] = Part(whole.slice, offset, str(array.dtype), array.shape)
                    offset += array.nbytes + -array.nbytes % PAGE_BYTES
                stride = len(packed)
        shape = (m.experts, m.intermediate, m.hidden)
        self.tensors[name] = Tensor(f"experts_{m.format}", shape, first, stride, tuple(digests))
        return name


def _padded(arrays: dict[str, NDArray[np.generic]]) -> bytes:
    """Every array on a page of its own."""
    return b"".join(array.tobytes() + bytes(-array.nbytes % PAGE_BYTES) for array in arrays.values())


def build_tiny_bundle(
    path: Path, model: TinyModel, tokenizer: bytes = b"{}", chat_template: str = ""
) -> Bundle:
    writer = BundleWriter(path)
    writer.add_file("tokenizer", tokenizer)
    make = _Writer(model, np.random.default_rng(model.seed))
    embedding = _embedding(writer, make)
    layers = tuple(_layer(writer, make, index) for index in range(model.layers))
    head = _head(writer, make)
    info = ModelInfo(
        name="tiny",
        family="tiny",
        kind=model.kind,
        hidden_size=model.hidden,
        vocab_size=model.vocab,
        max_context_tokens=model.max_context,
        kv_bytes_per_token_per_layer=2 * 4 * model.kv_heads * model.head_dim,
        eos_ids=(0,),
        bos_id=-1,
        weights=model.format,
    )
    frequencies = tuple(10000.0 ** (-2 * i / model.head_dim) for i in range(model.head_dim // 2))
    writer.finish(
        lambda slices: Manifest(
            info,
            embedding,
            layers,
            head,
            make.tensors,
            slices,
            {"main": Rope(frequencies)},
            "tokenizer",
            chat_template,
            {},
        ),
        SIGNING_KEY,
    )
    return Bundle.open(path)


def _embedding(writer: BundleWriter, make: _Writer) -> Block:
    m = make.model
    with writer.slice("embedding") as out:
        weights = {"weight": make.matrix(out, "embedding.weight", m.vocab, m.hidden)}
        operations = []
        if m.kind == "encoder":
            weights["position"] = make.matrix(out, "embedding.position", m.max_context, m.hidden, "fp32")
            weights["token_type"] = make.matrix(out, "embedding.token_type", 2, m.hidden, "fp32")
        operations.append(
            Operation("embedding", "/model/embedding", (), ("hidden",), weights, {"factor": 1.5})
        )
        if m.kind == "encoder":
            norm = {"weight": make.vector(out, "embedding.norm", m.hidden)}
            norm["bias"] = make.vector(out, "embedding.norm.bias", m.hidden, 0.0)
            operations.append(_op("layer_norm", "embedding", ("hidden",), "hidden", norm, epsilon=1e-6))
        return _block("embedding", operations, out, make.tensors, ["embedding"])


def _layer(writer: BundleWriter, make: _Writer, index: int) -> Block:
    m, at, key = make.model, f"layers.{index}", f"layers.{index}"
    width, kv_width = m.heads * m.head_dim, m.kv_heads * m.head_dim
    keys = [key]
    expert_names: dict[str, str] = {}
    if m.experts:
        with writer.slice(f"{key}.experts") as out:
            expert_names = {"experts": make.experts(out, f"{at}.experts")}
        keys.append(f"{key}.experts")
    with writer.slice(key) as out:

        def linear(name: str, source: str, rows: int, columns: int, bias: bool = False) -> Operation:
            weights = {"weight": make.matrix(out, f"{at}.{name}", rows, columns)}
            if bias:
                weights["bias"] = make.vector(out, f"{at}.{name}.bias", rows, 0.0)
            return _op("linear", f"{at}/{name}", (source,), name, weights)

        def norm(name: str, source: str) -> Operation:
            weights = {"weight": make.vector(out, f"{at}.{name}", m.hidden)}
            return _op("rms_norm", f"{at}/{name}", (source,), name, weights, epsilon=1e-6)

        norms = {}
        if m.qk_norm:
            norms = {
                "q_norm": make.vector(out, f"{at}.q_norm", m.head_dim),
                "k_norm": make.vector(out, f"{at}.k_norm", m.head_dim),
            }
        operations = [
            norm("norm1", "hidden"),
            linear("q", "norm1", width, m.hidden, bias=True),
            linear("k", "norm1", kv_width, m.hidden),
            linear("v", "norm1", kv_width, m.hidden),
            _op(
                "attention",
                f"{at}/attention",
                ("q", "k", "v"),
                "attended",
                norms,
                heads=m.heads,
                kv_heads=m.kv_heads,
                head_dim=m.head_dim,
                scale=m.head_dim**-0.5,
                rope="main" if m.kind == "generator" else "",
                window=m.window if index % 2 == 0 else 0,
                softcap=m.softcap,
                causal=m.kind == "generator",
                norm_epsilon=1e-6,
            ),
            linear("o", "attended", m.hidden, width),
            _op("add", f"{at}/add1", ("hidden", "o"), "middle"),
            norm("norm2", "middle"),
        ]
        if m.experts:
            operations += [
                linear("router", "norm2", m.experts, m.hidden),
                _op(
                    "experts",
                    f"{at}/experts",
                    ("norm2", "router"),
                    "mixed",
                    expert_names,
                    experts=m.experts,
                    top_k=m.top_k,
                    normalize=True,
                    softmax_after=m.softmax_after,
                    activation="silu",
                ),
            ]
        else:
            operations += [
                linear("gate", "norm2", m.intermediate, m.hidden),
                linear("up", "norm2", m.intermediate, m.hidden),
                _op("silu" if index % 2 else "gelu_tanh", f"{at}/activation", ("gate",), "active"),
                _op("mul", f"{at}/mul", ("active", "up"), "product"),
                linear("down", "product", m.hidden, m.intermediate),
                _op("gelu" if index % 2 else "tanh", f"{at}/squash", ("down",), "squashed"),
                _op("scale", f"{at}/scale", ("squashed",), "mixed", factor=0.5),
            ]
        operations.append(_op("add", f"{at}/add2", ("middle", "mixed"), "hidden"))
        return _block(key, operations, out, make.tensors, keys)


def _head(writer: BundleWriter, make: _Writer) -> Block:
    m = make.model
    with writer.slice("head") as out:
        if m.kind == "encoder":
            operations = [
                _op("pool", "head/pool", ("hidden",), "hidden", mode="mean", normalize=True),
            ]
        else:
            norm = {"weight": make.vector(out, "head.norm", m.hidden)}
            operations = [
                _op("rms_norm", "head/norm", ("hidden",), "normed", norm, epsilon=1e-6),
                _op("linear", "head/linear", ("normed",), "logits", {"weight": "embedding.weight"}),
                _op("softcap", "head/softcap", ("logits",), "hidden", cap=30.0),
            ]
        return _block("head", operations, out, make.tensors, ["head", "embedding"])


def _op(
    kind: str,
    name: str,
    inputs: tuple[str, ...],
    output: str,
    weights: dict[str, str] | None = None,
    **attributes: int | float | str | bool,
) -> Operation:
    return Operation(kind, f"/model/{name}", inputs, (output,), weights or {}, attributes)


def _block(
    name: str, operations: list[Operation], out: SliceWriter, tensors: dict[str, Tensor], keys: list[str]
) -> Block:
    segments = []
    first = 0
    while first < len(operations):
        last = first
        while last + 1 < len(operations) and not operations[last + 1].is_cut:
            last += 1
        if operations[first].is_cut:
            first += 1
            continue
        segments.append(_segment(operations, first, last, out, tensors))
        first = last + 1
    return Block(name, tuple(operations), tuple(segments), tuple(keys), out.size_bytes)


def _segment(
    operations: list[Operation], first: int, last: int, out: SliceWriter, tensors: dict[str, Tensor]
) -> Segment:
    run = operations[first : last + 1]
    made = [o.outputs[0] for o in run]
    inputs = tuple(dict.fromkeys(i for o in run for i in o.inputs if i not in made or i == "hidden"))
    later = {i for o in operations[last + 1 :] for i in o.inputs} | {"hidden"}
    outputs = tuple(n for n in dict.fromkeys(made) if n in later)
    graph = segment_graph(run, inputs, outputs, tensors)
    return Segment(out.add(graph), first, last, inputs, outputs)
