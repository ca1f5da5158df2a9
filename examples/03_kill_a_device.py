"""Kill a device in mid-answer, with a spare one paired: the same stream goes on, with the same tokens."""

import os
import signal
from typing import Any

from edge_runtime import DeviceSpec, LocalCluster

PROMPT = "import os\n"
NAMES = ("phone", "laptop", "mini-pc", "spare")
OPTIONS: dict[str, Any] = {"max_tokens": 96, "temperature": 0.8, "seed": 5}

if __name__ == "__main__":
    devices = [DeviceSpec(name=name, memory="512MiB", threads=1) for name in NAMES]
    with LocalCluster("demo", devices=devices, split=[(0, 1), (2, 3), (4, 5)]) as cluster:
        client = cluster.client()
        undisturbed = client.generate(PROMPT, **OPTIONS).token_ids
        received = []
        for token in client.stream(PROMPT, **OPTIONS):
            received.append(token.id)
            if token.index == 10:
                os.kill(cluster.pids["laptop"], signal.SIGKILL)
                print("killed the laptop after 11 tokens")
        holders = [device["name"] for device in cluster.devices() if device["layers"] is not None]
        print("layers are now on", ", ".join(sorted(holders)))
        assert tuple(received) == undisturbed, "the promise is broken: please report this"
        print(f"all {len(received)} tokens are those of the undisturbed run")
