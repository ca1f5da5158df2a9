"""A stream that the draft model takes over where the target can't be reached and the caller allowed it.

What came from the target stays, and is marked up to its last token; the rest is the draft's own. A device whose draft
model can't go on as the target began (another tokenizer, too small a context) fails as it would have without.

Knows: who speaks, and from which token on. Does not know: how either makes its tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Sequence

from edge_runtime.errors import EdgeRuntimeError, TransportError, UsageError
from edge_runtime.sdk.http import HttpSession
from edge_runtime.sdk.local_request import read_request
from edge_runtime.sdk.offline import Drawn, Ending, OfflineModel, OpenedDraft
from edge_runtime.sdk.results import DRAFT, TARGET, Question, Result, StreamToken
from edge_runtime.sdk.token_stream import AsyncTokenStream
from edge_runtime.sdk.unreachable import UNREACHABLE, is_unreachable

log = logging.getLogger(__name__)


class OfflineTokenStream(AsyncTokenStream):
    """As AsyncTokenStream, around the stream that asks the target."""

    def __init__(
        self, http: HttpSession, inner: AsyncTokenStream, model: OfflineModel, question: Question
    ) -> None:
        super().__init__(http, question.path, inner._make_body)
        self._inner = inner
        self._model = model
        self._question = question
        self._told: Result | None = None  # by the target, once the draft model answers
        self._ending: Ending | None = None
        self._drawn: list[Drawn] = []
        self._draft_name = ""
        self.cause: EdgeRuntimeError | None = None  # why the draft model answers

    @property
    def answered_by(self) -> str:
        told = self._told
        return DRAFT if told is not None and (self._drawn or not told.token_ids) else TARGET

    @property
    def result(self) -> Result:
        told, ending = self._told, self._ending
        if told is None or ending is None:
            return self._inner.result
        by_draft = self.answered_by == DRAFT
        ids = (*told.token_ids, *(drawn.id for drawn in self._drawn))
        return dataclasses.replace(
            told,
            text=told.text + "".join(drawn.text for drawn in self._drawn),
            token_ids=ids,
            finish_reason=ending.finish,
            timings=self._timings(len(ids)),
            prompt_token_ids=ending.prompt_ids,
            seed=ending.request.sampling.seed,
            model=self._draft_name if by_draft else told.model,
            answered_by=self.answered_by,
            target_tokens=len(told.token_ids),
            offline_reason=self.cause.message if by_draft and self.cause is not None else "",
            question=self._question if by_draft else None,
        )

    async def _run(self) -> AsyncGenerator[StreamToken, None]:
        self._begin_timing()
        try:
            async for token in self._inner:
                self._arrived()
                yield token
            return
        except EdgeRuntimeError as problem:
            if not is_unreachable(problem):
                raise
            self.cause = problem
        finally:
            await self._inner.aclose()
            self.resumed, self.request_id = self._inner.resumed, self._inner.request_id
        async with contextlib.aclosing(self._draft(self.cause)) as tokens:
            async for token in tokens:
                yield token

    async def _draft(self, cause: EdgeRuntimeError) -> AsyncGenerator[StreamToken, None]:
        told = self._inner.result
        try:
            opened = await self._model.open()
            ending = Ending(opened, read_request(self._question.body), self._prompt(opened, told))
            self._go_on(opened, ending, told)
        except EdgeRuntimeError as reason:
            raise _neither(cause, reason) from None
        self._told, self._ending, self._draft_name = told, ending, opened.name
        log.info("the draft model answers from token %d on: %s", len(told.token_ids), cause.message)
        async with contextlib.aclosing(self._model.draw(ending, told.token_ids)) as drawn:
            async for each in drawn:
                self._arrived()
                self._drawn.append(each)
                index = len(told.token_ids) + len(self._drawn) - 1
                yield StreamToken(each.id, each.text, index, DRAFT)

    def _prompt(self, opened: OpenedDraft, told: Result) -> Sequence[int]:
        """The target's own reading of it, where it answered already."""
        return told.prompt_token_ids if told.token_ids else opened.encode(self._question.body)

    def _go_on(self, opened: OpenedDraft, ending: Ending, told: Result) -> None:
        """Bring `ending` to where the target stopped. Raises UsageError where the ids mean other text here."""
        digest = self._inner.tokenizer
        same = not told.token_ids or digest in ("", opened.tokenizer_digest)
        text = "".join(ending.push(identity).text for identity in told.token_ids) if same else ""
        if not same or text != told.text:
            raise UsageError(
                f"{opened.name} reads the target's ids as other text",
                hint="draft with a model of the same tokenizer",
            )


def _neither(cause: EdgeRuntimeError, reason: EdgeRuntimeError) -> TransportError:
    return TransportError(
        f"{cause.message}; and the draft model can't answer: {reason.message}",
        hint=reason.hint or cause.hint,
        code=cause.code if cause.code in UNREACHABLE else "unreachable",
    )
