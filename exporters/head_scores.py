"""A bundle's head on many rows, a slice of the vocabulary at a time, with the kernel devices will use.

A head can be the largest tensor of a model, and an executor needs it several times over while loading. Columns of a
product don't depend on each other, so measuring can do with some of them at a time.
Knows: tensors' parts and graphs. Does not know: layers, or what scores are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Part, Tensor
from edge_runtime.engine.onnx import session_options
from edge_runtime.engine.resident import forget_pages
from exporters.checkpoint import Floats
from exporters.graph import compile_segments
from exporters.scores import LOGIT_COLUMNS

_CHUNK_WEIGHTS = 8 << 20  # of the head in one session


def head_logits(bundle: Bundle, hidden: Floats, threads: int) -> Iterator[tuple[int, Floats]]:
    """(first token id, logits [R, some]) in order, over the whole vocabulary."""
    head, tensors = bundle.manifest.head, bundle.manifest.tensors
    name = next(op.weights["weight"] for op in head.operations if op.kind == "linear")
    whole = tensors[name]
    step = max(1, min(_CHUNK_WEIGHTS // whole.shape[1], LOGIT_COLUMNS))
    bundle.verify(head.slices)
    for first in range(0, whole.shape[0], step):
        rows = min(step, whole.shape[0] - first)
        used = {**tensors, name: _rows(whole, first, rows)}
        segments = compile_segments("head", head.operations, used, hidden.shape[1])
        yield first, _run(bundle, head.slices, segments[0].model, hidden, threads)
        forget_pages(bundle, head.slices)


def _rows(tensor: Tensor, first: int, rows: int) -> Tensor:
    """Some rows of a tensor; nothing is copied."""

    def cut(part: Part) -> Part:
        row_bytes = math.prod(part.shape[1:]) * np.dtype(part.dtype).itemsize
        offset_bytes = part.offset_bytes + first * row_bytes
        return replace(part, offset_bytes=offset_bytes, shape=(rows, *part.shape[1:]))

    parts = {key: cut(part) for key, part in tensor.parts.items()}
    return replace(tensor, shape=(rows, *tensor.shape[1:]), parts=parts)


def _run(bundle: Bundle, slices: tuple[str, ...], model: bytes, hidden: Floats, threads: int) -> Floats:
    views = [bundle.slice_bytes(key) for key in slices]
    options = session_options(threads)
    options.add_external_initializers_from_files_in_memory(list(slices), views, [len(view) for view in views])
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    logits: Floats = session.run(None, {"hidden": hidden})[0]
    return logits
