"""`edge-runtime coordinator`: serve a bundle with the devices that join."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import config
from edge_runtime.cli.command import Command
from edge_runtime.cli.output import note, result, result_json

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig
    from coordinator.runtime import CoordinatorRuntime

MAX_JOIN_LINKS = 64


def _configure(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="directory of the model's bundle")
    add("--host", help="address to listen at, for agents and the API (default: 127.0.0.1)")
    add("--port", type=int, default=0, help="port of paired agents (default: any, kept over restarts)")
    add(
        "--enroll-port",
        type=int,
        default=0,
        help="port of agents that join (default: any, kept over restarts)",
    )
    add("--http-port", type=int, help="port of the HTTP API (default: 8080; 0: any)")
    add("--allowed-host", action="append", default=[], metavar="NAME", help="a further name clients may use")
    add("--state", type=Path, metavar="DIR", help="where keys and the journal are")
    add(
        "--split",
        default="auto",
        metavar="auto|even|experts|0-1,2-3,…",
        help="how layers are divided (default: auto); experts: one device runs all, others hold experts for it",
    )
    add(
        "--expert-loads",
        type=Path,
        metavar="FILE",
        help="of `doctor experts --loads FILE`: with --split experts the busiest stay where the layers run",
    )
    add("--devices", default="", metavar="NAME,…", help="devices of the pipeline, in order")
    add(
        "--replicas",
        default="auto",
        metavar="auto|N",
        help="pipelines over different devices: as many as slow none of them (default), or N",
    )
    add(
        "--wire",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="rows between layers: fp32 (default), fp16 (half the bytes), int8 (a quarter; approximate)",
    )
    add(
        "--kv",
        choices=("fp32", "int8"),
        default="fp32",
        help="keys and values (int8: a quarter of the memory)",
    )
    add("--api-key-file", type=Path, metavar="FILE", help="use this API key instead of a generated one")
    add("--join-links", type=int, default=1, metavar="N", help="join links to print (default: 1)")
    add(
        "--device-timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="silence after which a device is lost",
    )
    add("--ready-file", type=Path, metavar="FILE", help="write the addresses there, as JSON, once it listens")
    add("--json", action="store_true", help="one JSON object on stdout: url, api_key, join_links, pid")


def _run(arguments: Namespace) -> int:
    settings = config.load(
        {
            "coordinator.host": arguments.host,
            "coordinator.port": arguments.http_port,
            "general.state_directory": None if arguments.state is None else str(arguments.state),
        }
    )
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.general.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return asyncio.run(_serve(arguments, settings))


def coordinator_config(arguments: Namespace, settings: config.Config) -> CoordinatorConfig:
    from coordinator.config import CoordinatorConfig, parse_split
    from coordinator.decisions import Limits
    from edge_runtime.engine.base import StageFormats

    directory = settings.general.state_directory
    return CoordinatorConfig(
        bundle=arguments.bundle,
        state_directory=directory if arguments.state is not None else directory / "coordinator",
        host=settings.coordinator.host,
        port=arguments.port,
        enroll_port=arguments.enroll_port,
        split=parse_split(arguments.split, arguments.devices, arguments.replicas),
        kv_tokens_wanted=settings.coordinator.kv_tokens,
        keep_requests_seconds=settings.coordinator.keep_requests_seconds,
        keep_requests=settings.coordinator.keep_requests,
        formats=StageFormats(kv=arguments.kv, wire=arguments.wire),
        expert_loads=arguments.expert_loads,
        limits=Limits(device_timeout_seconds=arguments.device_timeout),
    )


async def _serve(arguments: Namespace, settings: config.Config) -> int:
    from coordinator import api_key
    from coordinator.api.app import LOCAL_HOSTS, create_app, serve
    from coordinator.api.keys import ApiKeys
    from coordinator.ports import reachable_host
    from coordinator.runtime import CoordinatorRuntime

    stop = _stop_on_signals()
    wanted = coordinator_config(arguments, settings)
    async with CoordinatorRuntime(wanted) as runtime:
        secret, key = await api_key.load_or_create(
            wanted.state_directory, arguments.api_key_file, runtime.journal
        )
        host = reachable_host(wanted.host)
        app = create_app(
            runtime,
            api_keys=ApiKeys([key]),
            allowed_hosts=(*LOCAL_HOSTS, wanted.host, host, *arguments.allowed_host),
        )
        runner, port = await serve(app, wanted.host, settings.coordinator.port)
        try:
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            _announce(arguments, runtime, url, secret)
            await stop.wait()
            note("stopping: running requests may finish")
            await runtime.drain()
        finally:
            await runner.cleanup()
    return 0


def _announce(arguments: Namespace, runtime: CoordinatorRuntime, url: str, secret: str) -> None:
    count = max(0, min(arguments.join_links, MAX_JOIN_LINKS))
    links = [runtime.create_join_link() for _ in range(count)]
    addresses = {"url": url, "api_key": secret, "join_links": links, "pid": os.getpid()}
    if arguments.ready_file is not None:
        _write_ready_file(arguments.ready_file, addresses)
    if arguments.json:
        result_json(addresses)
        return
    result(f"model      {runtime.model.name}")
    result(f"API        {url}/v1")
    result(f"console    {url}/")
    source = arguments.api_key_file or runtime.config.state_directory / "api.key"
    result(f"API key    {source}")
    for link in links:
        result(f"join link  {link}")
    if links:
        note("each join link pairs one device within ten minutes: edge-runtime agent --join 'LINK'")


def _write_ready_file(path: Path, addresses: dict[str, object]) -> None:
    """Appears whole or not at all, and only its owner can read it: it holds the key."""
    import json

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(addresses, file)
    temporary.rename(path)


def _stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM and the first Ctrl-C; the second Ctrl-C ends at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


COMMAND = Command("coordinator", "serve a bundle with the devices that join", _configure, _run)
