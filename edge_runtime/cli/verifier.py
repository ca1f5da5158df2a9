"""Flags of `generate --verifier`, and the remote verifier that they make.

The key of the coordinator is never sent to another server: a verifier's key comes from a file named here.
Knows: those flags. Does not know: the coordinator's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edge_runtime.cli.connection import read_key, sampling_options
from edge_runtime.cli.output import note
from edge_runtime.errors import UsageError

if TYPE_CHECKING:
    from edge_runtime.sdk.async_verifier import VerifyOptions
    from edge_runtime.sdk.remote_verifier import RemoteVerifier
    from edge_runtime.sdk.verifier_windows import Usage


def add_verifier_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("another server (vLLM, SGLang, …) instead of a coordinator")
    group.add_argument(
        "--verifier", metavar="URL", help="greedy decoding there, with drafts made on this device"
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json of its model, or a bundle with the same",
    )
    group.add_argument(
        "--dialect",
        default="auto",
        metavar="NAME",
        help="auto, vllm, sglang, prefixes or echo (default: auto)",
    )
    group.add_argument("--model", default="", metavar="NAME", help="which of its models (default: its first)")
    group.add_argument(
        "--stop-token-id",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help="a token that ends its texts, where it is no special token (repeatable)",
    )
    group.add_argument("--ca-file", type=Path, metavar="FILE", help="authorities to trust for its https")


def open_verifier(arguments: Namespace) -> RemoteVerifier:
    """Raises UsageError where flags don't fit together."""
    from edge_runtime.sdk.remote_verifier import RemoteVerifier

    if arguments.url:
        raise UsageError("--url is a coordinator's address, --verifier another server's", hint="give one")
    if arguments.offline != "never":
        raise UsageError("--offline is for coordinators, not for --verifier", hint="leave it out")
    if arguments.tokenizer is None:
        raise UsageError(
            "--verifier needs the tokenizer of the server's model",
            hint="--tokenizer PATH of its tokenizer.json",
        )
    key = read_key(arguments.api_key_file) if arguments.api_key_file is not None else ""
    return RemoteVerifier(
        arguments.verifier,
        tokenizer=arguments.tokenizer,
        draft=arguments.draft or "auto",
        dialect=arguments.dialect,
        model=arguments.model,
        stop_token_ids=arguments.stop_token_id,
        api_key=key,
        ca_file=arguments.ca_file,
    )


def verify_options(arguments: Namespace) -> VerifyOptions:
    return cast("VerifyOptions", sampling_options(arguments))


def note_promises(verifier: RemoteVerifier) -> None:
    """What is different from asking the server itself, before the first token."""
    from edge_runtime.sdk.async_verifier import GREEDY_ONLY

    note(f"{verifier.server().dialect.name} at {verifier.url}: {GREEDY_ONLY}")


def note_usage(usage: Usage, tokens: int) -> None:
    each = usage.prompt_tokens / max(1, tokens)
    note(
        f"{usage.requests} requests, {usage.windows} of them with drafts; {each:.1f} prompt tokens sent per token"
    )
