"""`edge-runtime agent`: make this device part of a cluster until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import config
from edge_runtime.cli import machine
from edge_runtime.cli.command import Command
from edge_runtime.cli.local_api import add_local_api_arguments, local_api, local_api_config
from edge_runtime.cli.output import note, result_json
from edge_runtime.errors import EdgeRuntimeError, UsageError

if TYPE_CHECKING:
    from edge_runtime.agent.config import AgentConfig
    from edge_runtime.agent.status import Status

_FREE_MEMORY_SHARE = 0.5


def _configure(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--join",
        metavar="LINK|-",
        help="join link of the coordinator; needed once. -: the first line of stdin, as others on this machine can "
        "read command lines",
    )
    parser.add_argument(
        "--join-file", type=Path, metavar="FILE", help="the join link is the first line of this file"
    )
    parser.add_argument("--name", help="name of this device (default: the host name)")
    parser.add_argument(
        "--memory",
        type=machine.size,
        metavar="SIZE",
        help="of the whole process, e.g. 512MiB (default: half of what is free); of the GPU, where torch uses one",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (default: one per core)")
    parser.add_argument(
        "--expert-cache",
        metavar="SIZE|all|auto",
        help="memory for the experts of a mixture-of-experts model, which otherwise stay on flash: a size, all, or "
        "auto: all where they fit, else what the rest leaves (default)",
    )
    parser.add_argument(
        "--expert-start-bits",
        choices=("all", "2", "4"),
        help="2 or 4: use experts on flash when so many bits of each weight are here, complete them later (2: bundles "
        "exported with --weights nested4 or nested8, 4: nested8): the first token comes sooner, and tokens are no "
        "longer the same on every run. all: whole experts only (default)",
    )
    parser.add_argument(
        "--expert-prediction",
        choices=("auto", "off"),
        help="auto: keep or read the next layer's experts on a guess, where tokens are found to be faster for it "
        "(default); off: never. Tokens are the same",
    )
    parser.add_argument(
        "--executor",
        choices=("auto", "native", "onnx", "torch"),
        help="who computes: our own kernels, ONNX Runtime, torch (on a CUDA device; without one, slowly as a "
        "reference), or auto: torch on a CUDA device, else native where it is fast (default)",
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="where the key, the pairing and fetched bundles are"
    )
    parser.add_argument(
        "--data-address",
        default="",
        metavar="HOST:PORT|none",
        help="where other devices dial this one (default: any free port); none: only through the coordinator",
    )
    parser.add_argument(
        "--advertise",
        default="",
        metavar="HOST:PORT",
        help="where other devices dial this one, if a forwarded port leads to its data address",
    )
    add_local_api_arguments(parser, "--local-api", "")
    parser.add_argument("--json", action="store_true", help="one JSON object per change of status on stdout")


def _run(arguments: Namespace) -> int:
    from edge_runtime.agent.daemon import Agent

    settings = config.load(
        {
            "agent.name": arguments.name,
            "agent.memory_bytes": arguments.memory,
            "agent.threads": arguments.threads,
            "agent.expert_cache": arguments.expert_cache,
            "agent.expert_start_bits": arguments.expert_start_bits,
            "agent.expert_prediction": arguments.expert_prediction,
            "agent.executor": arguments.executor,
            "agent.join": _join_link(arguments),
            "general.state_directory": None if arguments.state is None else str(arguments.state),
        }
    )
    agent_config = _agent_config(arguments, settings)
    _log_to_stderr(settings.general.log_level)
    agent = Agent(agent_config, on_status=_StatusPrinter(as_json=arguments.json))
    if not arguments.local_api:
        return asyncio.run(_until_stopped(agent.run))
    wanted = local_api_config(arguments)

    async def run_both() -> None:
        async with local_api(wanted, as_json=arguments.json):
            await agent.run()

    return asyncio.run(_until_stopped(run_both))


def _agent_config(arguments: Namespace, settings: config.Config) -> AgentConfig:
    from edge_runtime.agent.config import AgentConfig

    host, port = _data_address(arguments.data_address)
    name = settings.agent.name or socket.gethostname()
    directory = settings.general.state_directory
    return AgentConfig(
        name=name,
        state_directory=directory if arguments.state is not None else directory / "agent",
        memory_budget_bytes=settings.agent.memory_bytes or _free_memory(settings.agent.executor),
        threads=settings.agent.threads or machine.cores(),
        join=settings.agent.join,
        data_host=host,
        data_port=port,
        advertised_address=_advertised(arguments.advertise),
        log_level=settings.general.log_level,
        expert_cache=settings.agent.expert_cache,
        expert_start_bits=settings.agent.expert_start_bits,
        expert_prediction=settings.agent.expert_prediction,
        executor=settings.agent.executor,
    )


def _join_link(arguments: Namespace) -> str | None:
    """Of the flag, stdin or a file; None where none was given."""
    if arguments.join_file is not None:
        if arguments.join is not None:
            raise UsageError("a join link was given twice", hint="use --join or --join-file")
        try:
            return _first_line(arguments.join_file.read_text(encoding="utf-8"), str(arguments.join_file))
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(f"{arguments.join_file}: no join link can be read there: {problem}") from None
    if arguments.join == "-":
        return _first_line(sys.stdin.readline(), "stdin")
    link: str | None = arguments.join
    return link


def _first_line(text: str, where: str) -> str:
    link = text.partition("\n")[0].strip()
    if not link:
        raise UsageError(f"{where} holds no join link", hint="it is the line that the coordinator prints")
    return link


def _data_address(text: str) -> tuple[str, int]:
    from edge_runtime.agent.config import NO_DATA_PORT

    if text == "none":
        return "", NO_DATA_PORT
    if not text:
        return "", 0
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"{text!r} is not an address for other devices to dial",
            hint="write HOST:PORT (port 0: any) or none",
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _advertised(text: str) -> str:
    if text and _data_address(text)[1] < 1:
        raise UsageError(f"{text!r} is not an address that leads here", hint="write HOST:PORT")
    return text


async def _until_stopped(run: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Until SIGTERM or SIGINT, which end the agent cleanly, or until it can't go on."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        async with asyncio.TaskGroup() as tasks:
            agent = tasks.create_task(run())
            waiting = tasks.create_task(stopped.wait())
            await asyncio.wait((agent, waiting), return_when=asyncio.FIRST_COMPLETED)
            agent.cancel()
            waiting.cancel()
    except* EdgeRuntimeError as problems:
        raise problems.exceptions[0] from None
    return 0


class _StatusPrinter:
    """A line per change on stderr, or JSON on stdout; progress of one activity at most every tenth."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._told = ("", -1)

    def __call__(self, status: Status) -> None:
        if self._is_small_step(status):
            return
        if self._as_json:
            from dataclasses import asdict

            result_json({"event": type(status).__name__.lower(), **asdict(status)})
        else:
            note(str(status))

    def _is_small_step(self, status: Status) -> bool:
        from edge_runtime.agent.status import Loading

        if not isinstance(status, Loading):
            self._told = ("", -1)
            return False
        tenth = 10 * status.done_bytes // max(1, status.total_bytes)
        told, self._told = self._told, (status.activity, tenth)
        return told == self._told


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def _free_memory(executor: str) -> int:
    from edge_runtime.engine.executors import device_memory_bytes

    return device_memory_bytes(executor) or machine.share_of_free_memory(_FREE_MEMORY_SHARE)


COMMAND = Command("agent", "make this device part of a cluster", _configure, _run)
