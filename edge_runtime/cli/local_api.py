"""Flags of the local API, for `draft` and `agent`, and how it runs beside what they do.

The coordinator's own key, which commands on its machine find by themselves, is never used for other programs: a key
for callers who send none must be named. Knows: those flags. Does not know: requests.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import config
from edge_runtime.cli.connection import add_offline_argument, read_key
from edge_runtime.cli.output import note, result_json

if TYPE_CHECKING:
    from edge_runtime.local_api.server import LocalApiConfig

DEFAULT_ADDRESS = "127.0.0.1:8081"


def add_local_api_arguments(parser: ArgumentParser, flag: str, default: str) -> None:
    """`flag` names the address; "" as its default: no local API."""
    group = parser.add_argument_group(
        "local API: an OpenAI-compatible address on this device, with drafts made here"
    )
    said = f"default: {default}" if default else "default: none"
    group.add_argument(
        flag,
        dest="local_api",
        default=default,
        metavar="HOST:PORT",
        help=f"where it listens ({said}; port 0: any)",
    )
    group.add_argument(
        "--allow-remote", action="store_true", help="HOST may be one that other machines reach; not encrypted"
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name its clients may use",
    )
    group.add_argument(
        "--draft",
        default="auto",
        metavar="WHO",
        help="who guesses ahead: suffix (what the text repeats), model, auto (default), or a draft model's bundle",
    )
    group.add_argument("--url", help="the coordinator's HTTP API (default: the setting client.url)")
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="key for callers who send none (default: the setting client.api_key; without it they need their own)",
    )
    add_offline_argument(parser)


def local_api_config(arguments: Namespace) -> LocalApiConfig:
    """Raises UsageError, ConfigError."""
    from edge_runtime.local_api.guard import parse_address
    from edge_runtime.local_api.server import LocalApiConfig

    settings = config.load({"client.url": arguments.url}).client
    host, port = parse_address(arguments.local_api, allow_remote=arguments.allow_remote)
    key = settings.api_key if arguments.api_key_file is None else read_key(arguments.api_key_file)
    return LocalApiConfig(
        settings.url,
        api_key=key,
        draft=arguments.draft,
        offline=arguments.offline,
        host=host,
        port=port,
        allowed_hosts=tuple(name.lower() for name in arguments.allowed_host),
        timeout_seconds=settings.timeout_seconds,
    )


@asynccontextmanager
async def local_api(wanted: LocalApiConfig, *, as_json: bool) -> AsyncIterator[None]:
    """It listens until the block ends. Raises UsageError where the address can't be had."""
    from edge_runtime.local_api.server import serve

    runner, port = await serve(wanted)
    host = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
    try:
        if as_json:
            result_json({"event": "local_api", "url": f"http://{host}:{port}", "coordinator": wanted.url})
        else:
            note(f"local API at http://{host}:{port}/v1, with drafts for {wanted.url}")
        yield
    finally:
        await runner.cleanup()
