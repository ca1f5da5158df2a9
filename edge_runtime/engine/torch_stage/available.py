"""Whether this device can run torch stages, found out without importing torch where it can't.

Knows: the CUDA driver's first two calls, and where modules are. Does not know: stages. Imports no torch by itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys

from edge_runtime.errors import EngineError

_DRIVERS = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}


def require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise EngineError(
            "the torch executor needs torch, which is not installed here",
            hint="pip install 'edge-runtime[torch]', or use --executor auto",
        )


def has_cuda() -> bool:
    """A CUDA device, and a torch that can use it. Importing torch takes a second, so the driver is asked first."""
    if importlib.util.find_spec("torch") is None or _driver_devices() == 0:
        return False
    import torch

    return bool(torch.cuda.is_available()) and importlib.util.find_spec("triton") is not None


def _driver_devices() -> int:
    try:
        driver = ctypes.CDLL(_DRIVERS.get(sys.platform, "libcuda.so.1"))
        count = ctypes.c_int(0)
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # no driver here, or none we know
        return 0
    return 0 if failed else count.value
