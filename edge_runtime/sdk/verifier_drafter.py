"""Who drafts for a remote verifier, and the drafts at hand: the sequence's end is always what is certain.

Knows: one drafter on its thread, its last proposal. Does not know: servers, times.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from edge_runtime.core import SamplingParams
from edge_runtime.errors import UsageError
from edge_runtime.speculative.drafters.base import Drafter, Proposal, no_proposal
from edge_runtime.speculative.drafters.choose import AUTO, CHOICES, make_drafter
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory
from edge_runtime.speculative.driver import DrafterThread

DRAFT_SECONDS = 120.0  # a model's first draft reads the whole prompt
GREEDY = SamplingParams(temperature=0.0)

Value = TypeVar("Value")


class RemoteDrafter:
    """One request at a time. `open` before use, `close` when done."""

    def __init__(self, draft: str | Path, tokenizer_digest: str) -> None:
        """`draft`: a drafter's name, or the directory of a draft model's bundle. Raises UsageError for neither."""
        name = str(draft)
        path = None if name in CHOICES else Path(name)
        if path is not None and not path.is_dir():
            raise UsageError(
                f"{name!r} is no drafter", hint=f"one of {', '.join(CHOICES)}, or a draft model's bundle"
            )
        self._memory = SuffixMemory(tokenizer=tokenizer_digest)  # this user's, in this process
        self._thread = DrafterThread(
            lambda: make_drafter(
                AUTO if path else name,
                bundle=path,
                target_tokenizer=tokenizer_digest,
                memory=self._memory,
            )
        )
        self._length = 0
        self.proposal: Proposal = no_proposal("none")
        self._used = 0  # drafts of it that came true already

    async def open(self) -> None:
        """Raises what making the drafter raises: UsageError (another tokenizer), BundleError, CapacityError."""
        async with asyncio.timeout(DRAFT_SECONDS):
            await self._thread.open()

    async def close(self) -> None:
        async with asyncio.timeout(DRAFT_SECONDS):
            await self._thread.close()

    @property
    def drafts(self) -> tuple[int, ...]:
        """The chain at hand, after what is certain."""
        return self.proposal.ids[self._used : self.proposal.chain_length]

    @property
    def probabilities(self) -> tuple[float, ...]:
        return self.proposal.probabilities[self._used : self.proposal.chain_length]

    async def begin(self, prompt_ids: Sequence[int]) -> None:
        prompt = tuple(prompt_ids)
        self._length = len(prompt)
        self._forget()
        await self._do(lambda drafter: drafter.begin(prompt, GREEDY))

    async def draft(self, count: int) -> float:
        """Make up to `count` drafts, unless some are at hand. Gives the seconds that it took."""
        if self.drafts:
            return 0.0
        began = time.perf_counter()
        self.proposal, self._used = await self._do(lambda drafter: drafter.propose(count)), 0
        return time.perf_counter() - began

    async def committed(self, ids: Sequence[int]) -> int:
        """These ids are certain now. Drafts that came true stay at hand behind them. Gives how many came true."""
        drafts, certain, length = self.drafts, tuple(ids), self._length
        right = next(
            (i for i, (a, b) in enumerate(zip(drafts, certain, strict=False)) if a != b),
            min(len(drafts), len(certain)),
        )
        is_miss = right < min(len(drafts), len(certain))
        tried = drafts[: right + 1] if is_miss else ()

        def follow(drafter: Drafter) -> None:
            if is_miss:  # shown to the drafter, so that it knows which of its guesses was wrong
                drafter.extend(tried)
                drafter.rewind(length + right)
                drafter.extend(certain[right:])
            else:
                drafter.extend(certain)

        await self._do(follow)
        self._length += len(certain)
        if is_miss or right < len(certain):
            self._forget()
        else:
            self._used += right
        return right

    async def end(self, *, learn: bool) -> None:
        self._forget()
        await self._do(lambda drafter: drafter.end(learn=learn))

    def _forget(self) -> None:
        self.proposal, self._used = no_proposal(self.proposal.source), 0

    async def _do(self, call: Callable[[Drafter], Value]) -> Value:
        async with asyncio.timeout(DRAFT_SECONDS):
            return await asyncio.wrap_future(self._thread.do(call))
