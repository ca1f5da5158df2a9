"""An agent that notes when each step of its stage began and ended: `python timed_agent.py FILE agent --name …`.

It is the ordinary agent process with one method watched. The clock is the machine's monotonic one, so that the notes
of several agents on one machine line up. Knows: steps and times. Does not know: what is made of them (`steps.py`).
"""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path

from edge_runtime.engine.base import Batch, Rows
from edge_runtime.engine.onnx import OnnxStage
from edge_runtime.sdk import child

RECORD = struct.Struct("<ddqqqq")  # begin, end, session, base row, rows in all, KV bytes committed


def watch(path: Path) -> None:
    notes = path.open("ab", buffering=1 << 20)
    run = OnnxStage.run

    def watched(stage: OnnxStage, batch: Batch) -> Rows:
        begin = time.monotonic()
        rows = run(stage, batch)
        end = time.monotonic()
        first = batch.spans[0]
        count = sum(len(span.ids) for span in batch.spans)
        notes.write(RECORD.pack(begin, end, first.session, first.base_row, count, stage.kv_committed_bytes))
        return rows

    OnnxStage.run = watched  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    del sys.argv[1]
    sys.exit(child.run())
