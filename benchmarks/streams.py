"""Requests over HTTP whose tokens are timed where the caller gets them.

Knows: streams and clocks. Does not know: clusters, or what is compared.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from edge_runtime import AsyncClient

FIRST_WORD = 3  # ids below are special


@dataclass(slots=True)
class Stream:
    """One request as its caller saw it; times on the machine's monotonic clock."""

    prompt_tokens: int
    started: float
    token_times: list[float] = field(default_factory=list)
    ended: float = 0.0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)  # set by every token

    @property
    def ttft_seconds(self) -> float:
        return self.token_times[0] - self.started

    async def until(self, tokens: int) -> None:
        """Wait until so many tokens have come."""
        while len(self.token_times) < tokens:
            self.arrived.clear()
            await self.arrived.wait()

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first one: all of them over all of the time."""
        return (len(self.token_times) - 1) / (self.token_times[-1] - self.token_times[0])

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times)]


class Prompts:
    """Random ids, no prompt twice: what a cache of prefixes finds is what a benchmark put there."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def new(self, tokens: int) -> list[int]:
        return [int(i) for i in self._rng.integers(FIRST_WORD, self._vocab_size, tokens)]


async def stream(
    client: AsyncClient, prompt: Sequence[int], tokens: int, into: Stream | None = None
) -> Stream:
    """Run one greedy request to its end. `into` fills while it runs, for those who watch."""
    found = into if into is not None else Stream(len(prompt), 0.0)
    found.started = time.monotonic()
    async with client.stream(list(prompt), max_tokens=tokens, temperature=0, ignore_eos=True) as tokens_in:
        async for _ in tokens_in:
            found.token_times.append(time.monotonic())
            found.arrived.set()
    found.ended = time.monotonic()
    return found


async def together(client: AsyncClient, prompts: Sequence[Sequence[int]], tokens: int) -> list[Stream]:
    return list(await asyncio.gather(*(stream(client, prompt, tokens) for prompt in prompts)))


def total_tokens_per_second(streams: Sequence[Stream]) -> float:
    """While all of them decode: from the last first token to the first last one."""
    begin = max(each.token_times[0] for each in streams)
    end = min(each.token_times[-1] for each in streams)
    count = sum(begin < at <= end for each in streams for at in each.token_times)
    return count / (end - begin)
