"""`edge-runtime draft`: an OpenAI-compatible address on this device, which drafts for whoever asks it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from edge_runtime import config
from edge_runtime.cli.command import Command
from edge_runtime.cli.local_api import (
    DEFAULT_ADDRESS,
    add_local_api_arguments,
    local_api,
    local_api_config,
)

if TYPE_CHECKING:
    from edge_runtime.local_api.server import LocalApiConfig


_EPILOG = "Point an OpenAI client here instead of at the coordinator: the same answers, sooner where guesses are right."


def _configure(parser: ArgumentParser) -> None:
    add_local_api_arguments(parser, "--listen", DEFAULT_ADDRESS)
    parser.add_argument("--json", action="store_true", help="its address as one JSON object on stdout")
    parser.epilog = _EPILOG


def _run(arguments: Namespace) -> int:
    wanted = local_api_config(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=config.load({}).general.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    return asyncio.run(_serve(wanted, as_json=arguments.json))


async def _serve(wanted: LocalApiConfig, *, as_json: bool) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with local_api(wanted, as_json=as_json):
        await stopped.wait()
    return 0


COMMAND = Command("draft", "serve an OpenAI-compatible address here, with drafts", _configure, _run)
