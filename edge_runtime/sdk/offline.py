"""The draft model alone, as one who answers: its tokenizer and template from its bundle, its ids as it draws them.

The ids are the draft model's own under the request's keyed noise (docs/noise.md): what it would answer if it were the
target. Every id is drawn with the position and seed that the target would use, so the two often agree.

Knows: one bundle on this device, requests as ids. Does not know: why nobody else answers, links.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import SamplingParams
from edge_runtime.errors import BundleError, UsageError
from edge_runtime.sdk.drafter_pool import DrafterPool
from edge_runtime.sdk.drafting import shipped_draft
from edge_runtime.sdk.local_request import LocalRequest, limit, plain_messages
from edge_runtime.speculative.drafters.base import Drafter
from edge_runtime.speculative.drafters.choose import CHOICES, MODEL, make_drafter, tokenizer_digest
from edge_runtime.text import TextStream

NEVER, DRAFT = "never", "draft"
OFFLINE_CHOICES = (NEVER, DRAFT)
_AT_ONCE = 4  # ids drawn before they are given out: fewer trips between threads
MAX_ANSWERS = 2  # under way at a time, each with a model of its own; others wait


@dataclass(frozen=True, slots=True)
class Drawn:
    """One id of the draft model's. `finish`: "" while going on; "stop" or "length"."""

    id: int
    text: str
    finish: str


class OfflineModel:
    """Opened with the first question; `close` at the end. One event loop uses it."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError where there is no bundle."""
        if not (path / "manifest.json").is_file():
            raise UsageError(
                f"an offline answer needs a draft model, and {path} holds none",
                hint="name its bundle: draft=PATH, on the command line --draft PATH",
            )
        self._path = path
        self._opened: OpenedDraft | None = None
        self._opening = asyncio.Lock()
        self._pool = DrafterPool(self._make)
        self._room = asyncio.Semaphore(MAX_ANSWERS)

    def _make(self) -> Drafter:
        assert self._opened is not None
        return make_drafter(MODEL, bundle=self._opened.bundle)

    async def open(self) -> OpenedDraft:
        """Read the bundle, once. Raises BundleError, UsageError (it writes no text)."""
        async with self._opening:
            if self._opened is None:
                self._opened = await asyncio.to_thread(OpenedDraft, self._path)
            return self._opened

    async def draw(self, ending: Ending, before: Sequence[int]) -> AsyncGenerator[Drawn, None]:
        """Ids after the prompt and `before`, which `ending` has seen, to the end. Raises EngineError."""
        async with self._room, contextlib.aclosing(self._draw(ending, before)) as drawn:
            async for each in drawn:
                yield each

    async def _draw(self, ending: Ending, before: Sequence[int]) -> AsyncGenerator[Drawn, None]:
        thread = await self._pool.take()
        is_sound = True
        try:
            prompt_ids, sampling, ids = ending.prompt_ids, ending.request.sampling, tuple(before)
            await asyncio.wrap_future(thread.do(lambda drafter: _begin(drafter, prompt_ids, sampling, ids)))
            while not ending.finish:
                for identity in await asyncio.wrap_future(thread.do(_draw)):
                    yield ending.push(identity)
                    if ending.finish:
                        break
        except Exception:
            is_sound = False
            raise
        finally:
            thread.do(lambda drafter: drafter.end(learn=False))
            await self._pool.give(thread, is_sound=is_sound)

    async def close(self) -> None:
        await self._pool.close()


class Ending:
    """Text and end of one answer, id by id: the rules of the coordinator's generations.

    Ids that the target committed are pushed first: the same ids give the same pieces of text.
    """

    def __init__(self, opened: OpenedDraft, request: LocalRequest, prompt_ids: Sequence[int]) -> None:
        """Raises CapacityError."""
        self.request = request
        self.prompt_ids = tuple(prompt_ids)
        self._left = limit(request, len(prompt_ids), opened.context_tokens)
        self._stop_ids = frozenset() if request.ignore_eos else opened.eos_ids
        self._text = TextStream(opened.tokenizer, prompt_ids, request.stop)
        self.finish = ""

    def push(self, identity: int) -> Drawn:
        self._left -= 1
        self.finish = "stop" if identity in self._stop_ids else "length" if self._left < 1 else ""
        piece = self._text.push(identity, is_last=bool(self.finish))
        if piece.is_stop:
            self.finish = "stop"
        return Drawn(identity, piece.text, self.finish)


class OpenedDraft:
    """A draft model's bundle, read."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self.bundle = Bundle.open(path)
        manifest = self.bundle.manifest
        if manifest.model.kind != "generator":
            raise UsageError(f"{manifest.model.name} writes no text", hint="name a language model's bundle")
        try:
            self.tokenizer: Any = Tokenizer.from_str(self.bundle.tokenizer_json().decode())
        except Exception as problem:  # the library knows no other
            raise BundleError(f"{path}: its tokenizer can't be read: {problem}") from None
        self.name = manifest.model.name
        self.tokenizer_digest = tokenizer_digest(self.bundle)
        self.context_tokens = manifest.model.max_context_tokens
        self.eos_ids = frozenset(manifest.model.eos_ids)

    def encode(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """The prompt's ids. Raises UsageError where it is none, BundleError."""
        if "messages" in body:
            text = self._chat(body["messages"])
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)
        elif isinstance(body.get("prompt"), str):
            ids = tuple(self.tokenizer.encode(body["prompt"]).ids)
        else:
            ids = tuple(body.get("prompt") or ())
        if not ids or not all(type(each) is int and each >= 0 for each in ids):
            raise UsageError("an offline answer needs one prompt, of text or of token ids")
        return ids

    def _chat(self, messages: object) -> str:
        try:
            from edge_runtime.chat_template import ChatTemplate
        except ModuleNotFoundError as missing:
            raise UsageError(
                f"an offline answer to a conversation needs {missing.name}",
                hint="pip install 'edge-runtime[coordinator]'",
            ) from None
        manifest = self.bundle.manifest
        if not manifest.chat_template:
            raise UsageError(
                f"{self.name} has no chat template", hint="ask for a completion", code="model_cannot"
            )
        return ChatTemplate(manifest.chat_template, manifest.special_tokens).render(plain_messages(messages))


def offline_model(draft: str | Path) -> OfflineModel:
    """For a client's `draft`: the bundle it names, else the one that ships. Raises UsageError where there is none."""
    return OfflineModel(shipped_draft() if str(draft) in CHOICES else Path(draft))


def is_allowed(choice: str) -> bool:
    """Raises UsageError for what is no choice."""
    if choice not in OFFLINE_CHOICES:
        raise UsageError(
            f"{choice!r} says nothing about offline answers", hint=f"one of {', '.join(OFFLINE_CHOICES)}"
        )
    return choice == DRAFT


def _begin(
    drafter: Drafter, prompt_ids: Sequence[int], sampling: SamplingParams, before: Sequence[int]
) -> None:
    drafter.begin(prompt_ids, sampling)
    drafter.extend(before)


def _draw(drafter: Drafter) -> tuple[int, ...]:
    """The next ids; the drafter's sequence then holds them."""
    proposal = drafter.propose(_AT_ONCE)
    ids = proposal.ids[: proposal.chain_length]
    drafter.extend(ids)
    return ids
