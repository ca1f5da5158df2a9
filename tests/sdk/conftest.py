"""What tests of the SDK run against: a coordinator's API over a fake service, and other servers with a real model."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.support.drafting import drafter_threads
from tests.support.model_server import ModelServer, model_server
from tests.support.remote_verifiers import Serve
from tests.support.served_api import service, url

__all__ = ["service", "url"]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """`await serve("sglang")`: servers that live as long as the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(owner: str = "vllm", **options: object) -> ModelServer:
            return await stack.enter_async_context(model_server(owner, **options))  # type: ignore[arg-type]

        yield make
    assert not drafter_threads()
