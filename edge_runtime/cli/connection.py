"""Flags that every command talking to a coordinator shares, and the client they make.

On the coordinator's own machine no key is needed on the command line: the one it keeps in its state directory is used.
Knows: those flags. Does not know: what the commands ask.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edge_runtime import config
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.sdk.client import Client
    from edge_runtime.sdk.options import GenerateOptions

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_connection_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("coordinator")
    group.add_argument("--url", help="address of its HTTP API (default: the setting client.url)")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with the API key")


def add_draft_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        default="none",
        metavar="WHO",
        help="who guesses ahead on this device, for the same tokens sooner: suffix (what the text repeats), model,"
        " auto, or a draft model's bundle (default: none)",
    )


def add_offline_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--offline",
        default="never",
        metavar="never|draft",
        help="draft: where the coordinator can't be reached, this device's draft model answers alone, and the"
        " answer says so (default: never)",
    )


def open_client(arguments: Namespace) -> Client:
    from edge_runtime.sdk.client import Client

    settings = config.load({"client.url": arguments.url})
    key = settings.client.api_key
    if arguments.api_key_file is not None:
        key = read_key(arguments.api_key_file)
    elif not key and urlsplit(settings.client.url).hostname in _LOOPBACK:
        key = _own_key(settings.general.state_directory)
    return Client(
        settings.client.url,
        api_key=key,
        draft=getattr(arguments, "draft", None) or "none",
        offline=getattr(arguments, "offline", "never"),
    )


def _own_key(state_directory: Path) -> str:
    path = state_directory / "coordinator" / "api.key"
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_key(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: the API key can't be read: {problem}") from None


def add_sampling_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="at most so many new tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, help="the same seed gives the same tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (repeatable)")


def sampling_options(arguments: Namespace) -> GenerateOptions:
    """Those that were given."""
    given = {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
        "stop": arguments.stop,
    }
    options: GenerateOptions = {}
    options.update({name: value for name, value in given.items() if value is not None})  # type: ignore[typeddict-item]
    return options
