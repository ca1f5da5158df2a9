"""A command of the CLI in a child process that does not outlive its parent.

`python -m edge_runtime.sdk.child COMMAND …`: stdin is a pipe that only the parent holds open. When it ends, whatever
ended the parent, this process is told to stop, and stops itself soon after.

Knows: that pipe. Does not know: who starts it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

GRACE_SECONDS = 5.0


def _watch_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def run() -> int:
    threading.Thread(target=_watch_parent, name="parent-watch", daemon=True).start()
    from edge_runtime.cli.main import main

    try:
        return main(sys.argv[1:])
    finally:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # the parent may say it twice: what is ending ends in order


if __name__ == "__main__":
    sys.exit(run())
