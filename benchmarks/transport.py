"""How long one hop takes: a frame of rows from one process to another and back, codec and CURVE included.

Prints the machine and the settings, one line per size, and a JSON object last. A hop is half of a round trip.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import zmq

from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import FrameRows
from edge_runtime.transport import inproc, websocket, zeromq
from edge_runtime.transport.base import Connection
from edge_runtime.trust.admission import AnyKey
from edge_runtime.trust.identity import KeyPair, SigningKey

SIZES = ((4 << 10, 3000), (256 << 10, 300), (4 << 20, 40))
MESSAGE = FrameRows(1, 1, 0, 77, 100, (99,), (12345,), False)


async def echo(link: Connection) -> None:
    while True:
        message, payloads = codec.decode(await link.receive())
        await link.send(codec.encode(message, payloads))


async def measure(link: Connection) -> dict[str, float]:
    figures: dict[str, float] = {}
    for size, rounds in SIZES:
        rows, seconds = os.urandom(size), []
        for _ in range(rounds):
            started = time.perf_counter()
            await link.send(codec.encode(MESSAGE, [rows]))
            codec.decode(await link.receive())
            seconds.append((time.perf_counter() - started) / 2)
        seconds = sorted(seconds[rounds // 10 :])
        figures[f"hop_ms_p50_{size >> 10}k"] = round(1e3 * seconds[len(seconds) // 2], 4)
        figures[f"hop_ms_p99_{size >> 10}k"] = round(1e3 * seconds[int(0.99 * len(seconds))], 4)
    return figures


async def dial_back(kind: str, address: str, server_key: bytes) -> None:
    """The other process: connects and echoes."""
    if kind == "zeromq":
        link: Connection = await zeromq.connect(address, KeyPair.generate(), server_key)
    else:
        link = await websocket.connect(address, SigningKey.generate(), server_key)
    await echo(link)


async def between_processes(kind: str) -> dict[str, float]:
    key: Any = KeyPair.generate() if kind == "zeromq" else SigningKey.generate()
    listen: Callable[..., Any] = zeromq.listen if kind == "zeromq" else websocket.listen
    listener = await listen("tcp://127.0.0.1:0" if kind == "zeromq" else "ws://127.0.0.1:0", key, AnyKey())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.transport", "--echo", kind, listener.address, key.public.hex(),
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return await measure(await listener.accept())
    finally:
        process.kill()
        await process.wait()
        await listener.close()


async def in_process() -> dict[str, float]:
    key = KeyPair.generate()
    listener = await inproc.listen("inproc://", key, AnyKey())
    near = await inproc.connect(listener.address, key, key.public)
    echoing = asyncio.ensure_future(echo(await listener.accept()))
    try:
        return await measure(near)
    finally:
        echoing.cancel()
        await listener.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--echo", nargs=3, metavar=("KIND", "ADDRESS", "KEY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        kind, address, key = arguments.echo
        return await dial_back(kind, address, bytes.fromhex(key))
    results = {
        "zeromq_curve": await between_processes("zeromq"),
        "websocket": await between_processes("websocket"),
        "inproc": await in_process(),
    }
    if not arguments.json:
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
              f"libzmq {zmq.zmq_version()}, loopback, two processes, one FrameRows and its payload")  # fmt: skip
        for name, figures in results.items():
            print(name, " ".join(f"{key}={value}" for key, value in figures.items()))
    print(json.dumps({"hop_ms_p50": results["zeromq_curve"]["hop_ms_p50_4k"], **results}))


if __name__ == "__main__":
    asyncio.run(main())
