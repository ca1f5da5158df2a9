"""Verifiers of real servers with a real model: what is asked of them, and what they would say by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from edge_runtime.sdk.async_verifier import AsyncRemoteVerifier
from tests.support.model_server import DEMO, ModelServer

COPY = """def total(values):
    result = 0
    for value in values:
        result += value
    return result


def total(values):
    result = 0
"""
ENDING = "def main():\n    print('x')\n\n\nif __name__"  # the model ends its text soon after
KEY = "sk-secret-0123456789"
WAYS = [("vllm", "vllm"), ("vllm", "prefixes"), ("vllm", "echo"), ("vllm", "auto"), ("sglang", "auto")]

Serve = Callable[..., Awaitable[ModelServer]]


def verifier_of(server: ModelServer, **options: object) -> AsyncRemoteVerifier:
    return AsyncRemoteVerifier(server.url, **{"tokenizer": DEMO, "draft": "suffix", **options})  # type: ignore[arg-type]


_PLAIN: dict[tuple[str, int], list[int]] = {}


async def plain(server: ModelServer, prompt: str, count: int) -> list[int]:
    """What every one of these servers decodes by itself: the same model, so worked out once."""
    if (prompt, count) not in _PLAIN:
        _PLAIN[prompt, count] = await server.plain(prompt, count)
    return _PLAIN[prompt, count]


def eager(verifier: AsyncRemoteVerifier) -> None:
    """Measured as a server that takes long for every token of a stream, so that every draft is worth sending."""
    for _ in range(200):
        verifier._pace.stream_began(1.0)
        verifier._pace.streamed(1, 1.0)
