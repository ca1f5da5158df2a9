"""The demo target and the demo draft, as bundles: what ships, or what their checkpoints export to.

Knows: where they lie. Does not know: what is measured with them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks import report
from edge_runtime.bundle.bundle import Bundle
from exporters.export import ExportOptions, export_bundle

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "edge_runtime" / "demo" / "bundle"
DRAFT = ROOT / "edge_runtime" / "demo" / "draft"  # where there is none, the checkpoint is exported
CHECKPOINT = ROOT / "examples" / "models" / "draft"


def draft_bundle() -> Path:
    """The shipped draft, or the checkpoint in the target's weight format, exported once per checkpoint."""
    if (DRAFT / "manifest.json").exists():
        return DRAFT
    weights = Bundle.open(TARGET).manifest.model.weights
    digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]
    path = ROOT / ".bench" / f"demo-draft-{weights}-{digest}"
    if not path.exists():
        report.say(f"exporting the demo draft to {path.name}")
        path.parent.mkdir(exist_ok=True)
        export_bundle(CHECKPOINT, path, ExportOptions(weights=weights, calibration_tokens=256))
    return path
