"""A small model server that speaks as vLLM and SGLang do: real HTTP, a whole real model behind it, prefixes kept.

`with_faults` make it behave as servers do on bad days, or as none should. What it is asked is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from tokenizers import Tokenizer

from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SessionId
from edge_runtime.engine.base import Batch, Span
from edge_runtime.engine.cpu import CpuStage

DEMO = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
MAX_CONTEXT = 1024
HELD_TEXTS = 4


class Brain:
    """A model and the texts whose keys and values it holds. Blocking; one caller at a time."""

    def __init__(self, bundle: Bundle) -> None:
        layers = LayerRange(0, bundle.manifest.num_layers - 1)
        self._stage = CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=64 << 20)
        self._texts: dict[SessionId, list[int]] = {}  # least recently used first
        self._sessions = count(1)
        self.computed_rows = 0

    def logits(self, ids: Sequence[int], first: int) -> np.ndarray:
        """[len(ids) - first, V]: after each id from place `first` on. Rows before are taken from a held text."""
        session, same = self._best(ids, first)
        held = self._texts.pop(session)
        self._stage.drop(session, same) if same else self._reopen(session)
        span = Span(session, same, tuple(ids[same:]), logit_rows=len(ids) - first)
        rows = self._stage.run(Batch((span,), None))
        self.computed_rows += len(ids) - same
        held[same:] = ids[same:]
        self._texts[session] = held
        return rows

    def close(self) -> None:
        self._stage.close()

    def _best(self, ids: Sequence[int], first: int) -> tuple[SessionId, int]:
        shared = {one: min(_common(text, ids), first) for one, text in self._texts.items()}
        best = max(shared, key=lambda one: shared[one], default=None)
        if best is not None and (shared[best] > 0.5 * len(ids) or len(shared) == HELD_TEXTS):
            return best, shared[best]
        session = SessionId(next(self._sessions))
        self._stage.open(session, MAX_CONTEXT)
        self._texts[session] = []
        return session, 0

    def _reopen(self, session: SessionId) -> None:
        self._stage.drop(session)
        self._stage.open(session, MAX_CONTEXT)


def _common(held: Sequence[int], ids: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids))
    )


@dataclass
class Faults:
    """`later`: answers that say 429 first, with `retry_after`. `cut_after_events`: of the next stream. `lie`: how ranks
    are made up, "accept" or "reject"."""

    no_logprobs: bool = False
    no_token_ids: bool = False
    no_tokenize: bool = False
    later: int = 0
    later_status: int = 429
    retry_after: str = "0"
    seconds: float = 0.0  # of every answer
    token_seconds: float = 0.0  # of every streamed token
    company_seconds: float = 0.0  # how long an answer waits for another request to be here, too
    silent: bool = False
    cut_after_events: int = -1
    cut_answers: int = 0  # answers that break off in the middle
    lie: str = ""
    incremental: bool = False  # SGLang's other way to stream
    nan: bool = False


@dataclass
class ModelServer:
    """`owner`: who `/v1/models` says owns the model: "vllm", "sglang", or neither."""

    bundle: Bundle
    owner: str = "vllm"
    api_key: str = ""
    ends: tuple[int, ...] = (0,)
    faults: Faults = field(default_factory=Faults)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: Tokenizer = field(init=False)
    url: str = ""
    cancelled: int = 0
    at_once: int = 0  # requests being answered
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.brain = Brain(self.bundle)
        self.tokenizer = Tokenizer.from_str(self.bundle.tokenizer_json().decode())
        self._turn = asyncio.Lock()
        self._company = asyncio.Event()

    # ------------------------------------------------------------ the model

    async def _logits(self, ids: Sequence[int], first: int) -> np.ndarray:
        async with self._turn:
            running = asyncio.ensure_future(asyncio.to_thread(self.brain.logits, list(ids), first))
            try:
                return await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait({running})  # the caller left; the model is one caller's at a time
                raise

    async def greedy(
        self, ids: Sequence[int], max_tokens: int, *, ignore_end: bool = False
    ) -> AsyncIterator[int]:
        text = list(ids)
        for _ in range(max_tokens):
            await asyncio.sleep(self.faults.token_seconds)
            token = int((await self._logits(text, len(text) - 1))[0].argmax())
            yield token
            text.append(token)
            if token in self.ends and not ignore_end:
                return

    async def plain(self, prompt: str | Sequence[int], max_tokens: int) -> list[int]:
        """What a client without drafts would get."""
        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        return [token async for token in self.greedy(ids, max_tokens)]

    def _entry(self, row: np.ndarray, token: int, top: int) -> list[tuple[int, float, int]]:
        """(id, logprob, rank): the token's, then the `top` likeliest, as vLLM does."""
        shifted = row.astype(np.float64) - row.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        if self.faults.nan:
            logprobs[:] = np.nan
        best = int(row.argmax())
        rank = 1 if token == best else int((row >= row[token]).sum())
        entries = [(token, float(logprobs[token]), rank)]
        if self.faults.lie == "accept":
            return [(token, -0.01, 1)]
        if self.faults.lie == "reject" and token == best:
            other = (best + 1) % len(row)
            return [(token, -3.0, 2), (other, -0.1, 1)]
        if self.faults.lie == "contradict":
            return [(token, -0.5, 1), ((token + 1) % len(row), -0.1, 2)]
        if top and best != token:
            entries.append((best, float(logprobs[best]), 1))
        return entries

    async def _prompt_entries(
        self, ids: Sequence[int], first: int, top: int
    ) -> list[list[tuple[int, float, int]]]:
        """Of the places after `first`."""
        rows = await self._logits(ids, first)
        return [self._entry(rows[i], ids[first + 1 + i], top) for i in range(len(ids) - first - 1)]

    # ------------------------------------------------------------ HTTP

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._gate], client_max_size=64 << 20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/tokenize", self._tokenize)
        if self.owner == "sglang":
            app.router.add_post("/generate", self._generate)
        return app

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        faults = self.faults
        if faults.silent:
            await asyncio.sleep(60)
        if faults.later > 0 and request.method == "POST":
            faults.later -= 1
            headers = {"Retry-After": faults.retry_after}
            return web.json_response(
                {"error": {"message": "busy"}}, status=faults.later_status, headers=headers
            )
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once > 1:
            self._company.set()
        try:
            await asyncio.sleep(faults.seconds)
            await self._wait_for_company()
            answer: web.StreamResponse = await handler(request)
        finally:
            self.at_once -= 1
            if self.at_once < 2:
                self._company.clear()
        if faults.cut_answers > 0 and isinstance(answer, web.Response) and request.method == "POST":
            faults.cut_answers -= 1
            broken = web.StreamResponse(headers={"Content-Type": "application/json"})
            await broken.prepare(request)
            await broken.write(bytes(answer.body)[:20])  # type: ignore[arg-type]
            assert request.transport is not None
            request.transport.close()
            return broken
        return answer

    async def _wait_for_company(self) -> None:
        if self.faults.company_seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.faults.company_seconds):
                    await self._company.wait()

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": "demo", "object": "model", "owned_by": self.owner, "max_model_len": MAX_CONTEXT}
        return web.json_response({"object": "list", "data": [card]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        if self.faults.no_tokenize:
            raise web.HTTPNotFound
        body = await request.json()
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"]).ids
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": MAX_CONTEXT})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        assert body["temperature"] == 0
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(
                prompt, add_special_tokens=body.get("add_special_tokens", True)
            ).ids
        prompts = prompt if prompt and isinstance(prompt[0], list) else [prompt]
        if body.get("stream"):
            return await self._stream(request, body, prompts[0], self._completion_event)
        before = self.brain.computed_rows
        choices = await asyncio.gather(*(self._choice(body, ids, index) for index, ids in enumerate(prompts)))
        sent = sum(map(len, prompts))
        cached = max(0, sent - (self.brain.computed_rows - before))
        usage = {"prompt_tokens": sent, "prompt_tokens_details": {"cached_tokens": cached}}
        return web.json_response(
            {"object": "text_completion", "model": "demo", "choices": choices, "usage": usage}
        )

    async def _choice(self, body: dict[str, Any], ids: list[int], index: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        wanted = body.get("prompt_logprobs")
        echo = bool(body.get("echo")) and "logprobs" in body
        if (wanted is not None or echo) and not self.faults.no_logprobs:
            # From the start, as vLLM does: its cache has no log-probabilities.
            entries = await self._prompt_entries(ids, 0, 1 if echo else wanted)
        out = [token async for token in self.greedy(ids, body["max_tokens"])]
        choice["text"] = self.tokenizer.decode(out)
        choice["finish_reason"] = "stop" if out[-1] in self.ends else "length"
        if wanted is not None and not self.faults.no_logprobs:
            choice["prompt_logprobs"] = [None, *(self._vllm_place(place) for place in entries)]
        if body.get("return_token_ids") and not self.faults.no_token_ids:
            choice |= {"token_ids": out, "prompt_token_ids": ids}
        if echo and not self.faults.no_logprobs:
            choice["logprobs"] = self._echoed(ids, entries, out)
        elif "logprobs" in body:
            choice["logprobs"] = self._named(body, out)
        return choice

    def _vllm_place(self, place: list[tuple[int, float, int]]) -> dict[str, Any]:
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._text(token)}
            for token, logprob, rank in place
        }

    def _named(self, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        as_ids = body.get("return_tokens_as_token_ids") and not self.faults.no_token_ids
        names = [f"token_id:{token}" if as_ids else self._text(token) for token in ids]
        return {"tokens": names, "token_logprobs": [-0.1] * len(ids), "top_logprobs": [{}] * len(ids)}

    def _echoed(
        self, ids: list[int], entries: list[list[tuple[int, float, int]]], out: list[int]
    ) -> dict[str, Any]:
        tops = [{self._text(token): logprob for token, logprob, _ in place} for place in entries]
        return {
            "tokens": [self._text(token) for token in [*ids, *out]],
            "token_logprobs": [None, *(place[0][1] for place in entries), -0.1],
            "top_logprobs": [None, *tops, {self._text(out[-1]): -0.1}],
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], ids: list[int], event: Any
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sampling = body.get("sampling_params", body)
        limit = sampling.get("max_tokens") or sampling["max_new_tokens"]
        out: list[int] = []
        try:
            async for token in self.greedy(ids, limit, ignore_end=sampling.get("ignore_eos", False)):
                if self.faults.cut_after_events == len(out):
                    self.faults.cut_after_events = -1
                    assert request.transport is not None
                    request.transport.close()
                    return response
                out.append(token)
                ended = token in self.ends and not sampling.get("ignore_eos", False)
                reason = "stop" if ended else "length" if len(out) == limit else None
                await response.write(f"data: {json.dumps(event(body, out, reason))}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        except ConnectionResetError:
            self.cancelled += 1
        return response

    def _completion_event(self, body: dict[str, Any], out: list[int], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": self._text(out[-1]), "finish_reason": reason}
        if body.get("return_token_ids") and not self.faults.no_token_ids:
            choice["token_ids"] = out[-1:]
        if "logprobs" in body:
            choice["logprobs"] = self._named(body, out[-1:])
        return {"object": "text_completion", "choices": [choice]}

    # ------------------------------------------------------------ SGLang's own

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        sampling = body["sampling_params"]
        assert sampling["temperature"] == 0
        ids = body["input_ids"] if "input_ids" in body else self.tokenizer.encode(body["text"]).ids
        if body.get("stream"):
            return await self._stream(request, body, ids, self._generate_event)
        before, meta = self.brain.computed_rows, {}
        if body.get("return_logprob") and not self.faults.no_logprobs:
            start = body["logprob_start_len"]
            entries = await self._prompt_entries(ids, start, body.get("top_logprobs_num", 0))
            meta["input_token_logprobs"] = [
                [None, ids[start], None],
                *([p[0][1], p[0][0], None] for p in entries),
            ]
            meta["input_top_logprobs"] = [None, *([[p[-1][1], p[-1][0], None]] for p in entries)]
        out = [token async for token in self.greedy(ids, sampling["max_new_tokens"])]
        meta |= self._meta(out, sampling["max_new_tokens"])
        meta["cached_tokens"] = max(0, len(ids) - (self.brain.computed_rows - before))
        return web.json_response({"text": self.tokenizer.decode(out), "output_ids": out, "meta_info": meta})

    def _meta(self, out: list[int], limit: int) -> dict[str, Any]:
        # The length is looked at first: a last token that ends the text is not told apart.
        reason = {"type": "length", "length": limit} if len(out) >= limit else None
        if reason is None and out[-1] in self.ends:
            reason = {"type": "stop", "matched": out[-1]}
        return {"completion_tokens": len(out), "finish_reason": reason}

    def _generate_event(self, body: dict[str, Any], out: list[int], reason: str | None) -> dict[str, Any]:
        meta = self._meta(out, body["sampling_params"]["max_new_tokens"])
        return {"output_ids": out[-1:] if self.faults.incremental else out, "meta_info": meta}


@asynccontextmanager
async def model_server(
    owner: str = "vllm", *, api_key: str = "", tls: ssl.SSLContext | None = None, bundle: Path = DEMO
) -> AsyncIterator[ModelServer]:
    server = ModelServer(Bundle.open(bundle), owner=owner, api_key=api_key)
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    port = runner.addresses[0][1]
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
    try:
        yield server
    finally:
        await runner.cleanup()
        server.brain.close()
