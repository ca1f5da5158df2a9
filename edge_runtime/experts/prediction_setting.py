"""What may be done about the next layer's experts: a setting.

Knows: its values. Does not know: what they lead to (`prediction`).
"""

from __future__ import annotations

AUTO = "auto"  # what a trial says is faster here
OFF = "off"
KEEP, READ = "keep", "read"  # without a trial: for tests and measurements
SETTINGS = (AUTO, OFF)
PREDICTIONS = (*SETTINGS, KEEP, READ)
