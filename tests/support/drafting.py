"""A prompt that is worth drafting, and the threads that draft."""

from __future__ import annotations

import threading

from edge_runtime.speculative.driver import THREAD_NAME

REPEATED = "bcdefghijklmnopqrstuvwxyza" * 2


def drafter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
