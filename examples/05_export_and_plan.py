"""From a checkpoint to a bundle, and what the planner would do with three machines you describe."""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory) / "moe-int4"
        export = [*COMMAND, "export", str(HERE / "models" / "moe"), str(bundle), "--weights", "int4"]
        subprocess.run(export, check=True)
        plan = [*COMMAND, "plan", str(bundle), "--devices", str(HERE / "devices.toml")]
        subprocess.run(plan, check=True)
