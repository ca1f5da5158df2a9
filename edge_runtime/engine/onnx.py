"""Segments on ONNX Runtime: the uncut operations between cut ones, each a session over a bundle's slices.

The graphs hold no weights. Sessions read them from the mapped slices while loading, repack the matrices for the
processor, and need the slices no more: their resident pages are given back.
Knows: ONNX Runtime and its memory and threads. Does not know: what the operations mean, sessions of users, batches.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.bundle.manifest import Block, Segment
from edge_runtime.errors import EngineError

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]

# Up to so many threads, sessions have sleeping pools of their own: as fast as one shared pool that spins (5.2 and
# 5.1 ms a step at 2 threads), twice as fast where others compete for the cores, and no time is burnt between steps.
# A shared pool can't be told not to spin, but with more threads a pool for each of hundreds of sessions would be
# thousands.
MAX_OWN_POOL_THREADS = 4

_shared_pool_threads = 0  # of the process, 0: not made yet


def session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    if _shares_pool(threads):
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Rows come in every number: an arena would keep the largest batch's memory, and patterns would never repeat.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


def _shares_pool(threads: int) -> bool:
    """The shared pool is made once per process, and from then on ONNX Runtime lets no session have its own."""
    global _shared_pool_threads
    if _shared_pool_threads == 0 and threads > MAX_OWN_POOL_THREADS:
        ort.set_global_thread_pool_sizes(threads, 1)
        _shared_pool_threads = threads
    if _shared_pool_threads not in (0, threads):
        log.warning(
            "this process shares a pool of %d threads; %d cannot be had now", _shared_pool_threads, threads
        )
    return _shared_pool_threads > 0


class OnnxSegment:
    """One segment, ready to run on any number of rows. Values are matched by position, not by name."""

    def __init__(self, bundle: Bundle, block: Block, segment: Segment, threads: int) -> None:
        self.inputs = segment.inputs
        self.outputs = segment.outputs
        name = f"{block.name} operations {segment.first_operation}-{segment.last_operation}"
        experts = bundle.manifest.expert_slices(
            block
        )  # no segment uses them, and they may have to stay on flash
        slices = {key: bundle.slice_bytes(key) for key in block.slices if key not in experts}
        filled = {key: view for key, view in slices.items() if len(view)}
        options = session_options(threads)
        options.add_external_initializers_from_files_in_memory(
            list(filled), list(filled.values()), [len(view) for view in filled.values()]
        )
        graph = bundle.part(segment.graph).tobytes()
        try:
            self._session = ort.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
