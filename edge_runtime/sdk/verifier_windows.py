"""Windows on their way to a server: the one that is waited for, and one more that supposes it comes out well.

The second begins where the first would end if all of its drafts stood and the server's own id were the next draft. So a
round trip is not spent idle while drafts are right. If they are not, its answer is never looked at.

Knows: two requests, what each cost. Does not know: which drafts are worth it, what verdicts lead to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.sdk.verifier_link import VerifierLink
from edge_runtime.speculative.verifiers.base import Dialect, Verdict, Window


@dataclass(slots=True)
class Usage:
    """What one generation asked of the server. Prompt tokens: those sent, those it says it had cached."""

    requests: int = 0
    windows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    window: Window
    verdict: Verdict
    seconds: float


class Windows:
    """Of one generation. `close` when done."""

    def __init__(self, link: VerifierLink, dialect: Dialect, usage: Usage) -> None:
        self._link = link
        self._dialect = dialect
        self._usage = usage
        self._ahead: tuple[Window, asyncio.Task[Answer]] | None = None

    async def next_for(self, ids: Sequence[int]) -> Window | None:
        """The window that is on its way already, if it follows `ids`; one that does not is given up."""
        if self._ahead is not None and list(self._ahead[0].ids) != list(ids):
            await self.close()
        return None if self._ahead is None else self._ahead[0]

    async def ask(self, window: Window, ahead: Window | None) -> Answer:
        """The answer to `window` (sent now, unless it is on its way); `ahead` is sent behind it."""
        task = self._ahead[1] if self._ahead is not None and self._ahead[0] == window else self._send(window)
        self._ahead = None if ahead is None else (ahead, self._send(ahead))
        try:
            answer = await task
        finally:
            task.cancel()  # where the caller left; a task that is done does not mind
        self._usage.cached_tokens += answer.verdict.cached_tokens or 0
        return answer

    async def close(self) -> None:
        """Nothing is on its way any more."""
        if self._ahead is None:
            return
        (window, task), self._ahead = self._ahead, None
        self._usage.rejected_drafts += len(window.drafts)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody wants to know

    def _send(self, window: Window) -> asyncio.Task[Answer]:
        self._usage.windows += 1
        self._usage.prompt_tokens += self._dialect.prompt_tokens(window)
        return asyncio.create_task(self._round(window))

    async def _round(self, window: Window) -> Answer:
        began = time.perf_counter()
        answer = await self._link.post(self._dialect.path, self._dialect.verify_body(window))
        return Answer(window, self._dialect.read_verdict(window, answer), time.perf_counter() - began)
