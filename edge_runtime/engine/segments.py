"""Compiled segments: the uncut operations between cut ones, each an ONNX Runtime session over a bundle's slices.

The graphs hold no weights. Sessions read them from the mapped slices while loading, repack the matrices for the
processor, and need the slices no more: their resident pages are given back.
Knows: ONNX Runtime and its memory and threads. Does not know: what the operations mean, sessions of users, batches.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block, Segment
from edge_runtime.errors import EngineError

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

_global_threads = 0  # of the process, 0: not set yet


def use_global_threads(threads: int) -> None:
    """One pool for all sessions of the process: a pool each makes a step several times slower.

    ONNX Runtime takes the number once, before its first session; a later wish for another is logged and not met.
    """
    global _global_threads
    if _global_threads == 0:
        ort.set_global_thread_pool_sizes(threads, 1)
        _global_threads = threads
    elif _global_threads != threads:
        log.warning("this process computes with %d threads; %d cannot be had now", _global_threads, threads)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    # Rows come in every number: an arena would keep the largest batch's memory, and patterns would never repeat.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


class SegmentStep:
    """One segment, ready to run on any number of rows. Values are matched by position, not by name."""

    def __init__(self, bundle: Bundle, block: Block, segment: Segment) -> None:
        self.inputs = segment.inputs
        self.outputs = segment.outputs
        name = f"{block.name} operations {segment.first_operation}-{segment.last_operation}"
        slices = {key: bundle.slice_bytes(key) for key in block.slices}
        filled = {key: view for key, view in slices.items() if len(view)}
        options = _options()
        options.add_external_initializers_from_files_in_memory(
            list(filled), list(filled.values()), [len(view) for view in filled.values()]
        )
        graph = bundle.part(segment.graph).tobytes()
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            raise EngineError(
                f"ONNX Runtime could not load {name}: {_first_line(error)}",
                hint="export the bundle again, or update onnxruntime on this device",
            ) from error
        self._names = [value.name for value in self._session.get_inputs()]
        found = (len(self._names), len(self._session.get_outputs()))
        if found != (len(segment.inputs), len(segment.outputs)):
            raise EngineError(
                f"the graph of {name} takes {found[0]} values and gives {found[1]}; "
                f"the manifest says {len(segment.inputs)} and {len(segment.outputs)}"
            )

    def run(self, values: Sequence[Float32]) -> list[Float32]:
        # Plain `run` with a dict: binding costs five times as much for graphs this small.
        result: list[Float32] = self._session.run(None, dict(zip(self._names, values, strict=True)))
        return result


def forget_pages(bundle: Bundle, keys: Sequence[str]) -> None:
    """Take mapped slices out of this process's resident memory; they are read again where they are touched again."""
    for key in keys:
        owner = bundle.slice_bytes(key).obj
        if isinstance(owner, mmap.mmap) and hasattr(owner, "madvise"):
            owner.madvise(mmap.MADV_DONTNEED)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
