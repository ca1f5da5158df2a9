"""ONNX Runtime reports usage to its vendor from every process unless told not to before it is first imported.

Setting the variable is the only switch that works (measured with 1.31: `disable_telemetry_events()` comes too late, the
event database is open by then). Whoever wants the reports sets ORT_DISABLE_TELEMETRY=0 themselves.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
