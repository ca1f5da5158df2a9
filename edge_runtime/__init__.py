"""One model over all your devices.

    from edge_runtime import LocalCluster, DeviceSpec

    devices = [DeviceSpec(name="phone"), DeviceSpec(name="laptop")]
    with LocalCluster("demo", devices=devices) as cluster:
        print(cluster.client().generate("def fibonacci(n):", max_tokens=64).text)

Names are loaded when they are first used: `import edge_runtime` alone costs nothing. Nothing reports usage to anyone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from edge_runtime import _telemetry as _telemetry  # first: before anything can import onnxruntime

if TYPE_CHECKING:
    from edge_runtime.errors import EdgeRuntimeError
    from edge_runtime.sdk.agent import Agent
    from edge_runtime.sdk.async_client import AsyncClient
    from edge_runtime.sdk.async_verifier import AsyncRemoteVerifier
    from edge_runtime.sdk.client import Client
    from edge_runtime.sdk.cluster import LocalCluster
    from edge_runtime.sdk.device_spec import DeviceSpec
    from edge_runtime.sdk.remote_verifier import RemoteVerifier
    from edge_runtime.sdk.results import Result, StreamToken, Timings, Upgrade

__all__ = [
    "Agent",
    "AsyncClient",
    "AsyncRemoteVerifier",
    "Client",
    "DeviceSpec",
    "EdgeRuntimeError",
    "LocalCluster",
    "RemoteVerifier",
    "Result",
    "StreamToken",
    "Timings",
    "Upgrade",
]

_HOMES = {
    "Agent": "edge_runtime.sdk.agent",
    "AsyncClient": "edge_runtime.sdk.async_client",
    "AsyncRemoteVerifier": "edge_runtime.sdk.async_verifier",
    "Client": "edge_runtime.sdk.client",
    "DeviceSpec": "edge_runtime.sdk.device_spec",
    "EdgeRuntimeError": "edge_runtime.errors",
    "LocalCluster": "edge_runtime.sdk.cluster",
    "RemoteVerifier": "edge_runtime.sdk.remote_verifier",
    "Result": "edge_runtime.sdk.results",
    "StreamToken": "edge_runtime.sdk.results",
    "Timings": "edge_runtime.sdk.results",
    "Upgrade": "edge_runtime.sdk.results",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
