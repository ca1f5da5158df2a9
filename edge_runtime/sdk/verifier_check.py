"""Whether a server may verify drafts at all: its dialect, its tokenizer, and that its verdicts are its own decoding.

A short text is decoded, then handed back as drafts with a wrong id at the end. The server must find each of its own
tokens likeliest and refuse the wrong one. One place may differ (two tokens may be equally likely to the last bits that
its arithmetic keeps); more is a server whose log-probabilities say something else than what it would write.

Knows: what is asked and what must come of it. Does not know: requests that people make.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import EdgeRuntimeError, ProtocolError, UsageError
from edge_runtime.sdk.verifier_link import Json, VerifierLink
from edge_runtime.speculative.verifiers.base import INCONSISTENT, UNKNOWN, Dialect, Window
from edge_runtime.speculative.verifiers.cheapest import Cheapest
from edge_runtime.speculative.verifiers.echo import Echo
from edge_runtime.speculative.verifiers.pace import Pace
from edge_runtime.speculative.verifiers.prefixes import Prefixes
from edge_runtime.speculative.verifiers.sglang import Sglang
from edge_runtime.speculative.verifiers.token_names import TokenNames
from edge_runtime.speculative.verifiers.vllm import VllmPrompt

log = logging.getLogger(__name__)
AUTO = "auto"
DIALECTS = (AUTO, "vllm", "sglang", "prefixes", "echo")
PROBE_TEXT = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n"
PROBE_TOKENS = 8
TOKENIZER_TEXTS = (
    "def f(x):\n    return {'a': x[0], \"b\": 1.5e-3}\n",
    "Grüße aus Köln, 你好, привет! 12345 67,890  three   spaces\tand a tab",
    "<div class='x'>don't  stop…</div>\n\n\n",
)


@dataclass(frozen=True, slots=True)
class Server:
    """What was found. `max_context`: prompt and answer, in tokens; None where the server does not say."""

    model: str
    dialect: Dialect
    max_context: int | None


async def examine(link: VerifierLink, *, dialect: str, model: str, tokenizer: Any, pace: Pace) -> Server:
    """Ask what it is, try its dialects, compare tokenizers. `pace` gets the times of it.

    Raises UsageError (another tokenizer, no such model), ProtocolError (no prompt log-probabilities, or wrong ones), or
    what the link raises.
    """
    card = await _model_card(link, model)
    name = str(card.get("id") or model)
    found = await _first_that_passes(link, _candidates(dialect, card, name, tokenizer), tokenizer, pace)
    await _compare_tokenizers(link, found, name, tokenizer)
    context = card.get("max_model_len")
    return Server(name, found, context if isinstance(context, int) and context > 0 else None)


async def _model_card(link: VerifierLink, model: str) -> Json:
    listed = (await link.get("/v1/models")).get("data")
    cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
    found = [card for card in cards if model in ("", card.get("id"))]
    if not found:
        names = ", ".join(str(card.get("id")) for card in cards) or "none"
        raise UsageError(f"the server has no model {model!r}", hint=f"its models: {names}")
    return found[0]


def _candidates(dialect: str, card: Json, model: str, tokenizer: Any) -> list[Dialect]:
    """In the order of preference."""
    names = TokenNames(tokenizer)
    makers: dict[str, Callable[[], Dialect]] = {
        "vllm": lambda: VllmPrompt(model, names),
        "sglang": Sglang,
        "prefixes": lambda: Prefixes(model, names),
        "echo": lambda: Echo(model, names),
    }
    if dialect != AUTO:
        return [makers[dialect]()]
    order = ["vllm", "prefixes", "echo"]
    order.insert(0 if card.get("owned_by") == "sglang" else 2, "sglang")
    return [makers[one]() for one in order]


async def _first_that_passes(
    link: VerifierLink, candidates: Sequence[Dialect], tokenizer: Any, pace: Pace
) -> Dialect:
    """The first; on vLLM, whatever the text is long enough for (`Cheapest`) where both of its ways pass."""
    passed: list[Dialect] = []
    problems: list[ProtocolError | UsageError] = []
    for dialect in candidates:
        if passed and (passed[0].name, dialect.name) != ("vllm", "prefixes"):
            break
        try:
            await _try(link, dialect, tokenizer, pace)
            passed.append(dialect)
        except (ProtocolError, UsageError) as problem:
            log.debug("the dialect %s: %s", dialect.name, problem)
            problems.append(problem)
            if problem.code == INCONSISTENT and not passed:
                raise  # it speaks the dialect, and says what can't be: no other way makes it trustworthy
    if not passed:
        if len(problems) == 1:
            raise problems[0]
        tried = "; ".join(f"{one.name}: {why}" for one, why in zip(candidates, problems, strict=True))
        raise ProtocolError(
            f"{link.url} can't verify drafts ({tried})",
            hint="it needs log-probabilities of prompts: vLLM, SGLang, or `echo` with `logprobs`",
            code="no_prompt_logprobs",
        )
    return passed[0] if len(passed) == 1 else Cheapest(passed)


async def _try(link: VerifierLink, dialect: Dialect, tokenizer: Any, pace: Pace) -> None:
    ids = tuple(tokenizer.encode(PROBE_TEXT).ids)
    own = await _decoded(link, dialect, ids, pace)
    if not own:
        raise ProtocolError("the server decoded nothing after a probe text", hint="is it a language model?")
    wrong = next(token for token in ids if token != own[-1])
    window = Window(ids, (*own[:-1], wrong))
    began = time.perf_counter()
    verdict = dialect.read_verdict(window, await link.post(dialect.path, dialect.verify_body(window)))
    pace.verified(len(window.drafts), time.perf_counter() - began)
    differing = sum(a != b for a, b in zip(own, verdict.own, strict=False))
    if differing > 1 or verdict.own[len(own) - 1] == wrong:
        raise ProtocolError(
            f"the server's verdicts are not its own decoding: {differing} of {len(own)} tokens differ",
            hint="its log-probabilities are not those of the model that it decodes with; don't use it as a verifier",
            code=INCONSISTENT,
        )


async def _decoded(link: VerifierLink, dialect: Dialect, ids: tuple[int, ...], pace: Pace) -> tuple[int, ...]:
    found: tuple[int, ...] = ()
    first_ids = 0
    began = first = time.perf_counter()
    body = dialect.decode_body(ids, PROBE_TOKENS, ignore_end=False)
    async with link.events(dialect.path, body) as events:
        async for event in events:
            piece = dialect.read_event(event, len(found))
            if piece.ids and not found:
                first = time.perf_counter()
                first_ids = len(piece.ids)
                pace.stream_began(first - began)
            found += piece.ids
            if piece.finished:
                break
    if found:
        pace.streamed(len(found) - first_ids, time.perf_counter() - first)
    return found


async def _compare_tokenizers(link: VerifierLink, dialect: Dialect, model: str, tokenizer: Any) -> None:
    """Raises UsageError where the server reads a text as other ids."""
    for text in TOKENIZER_TEXTS:
        ours = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        theirs = await _read_by_server(link, dialect, model, text)
        # The server may put a token of its own before a text, and say nothing about the first place of a prompt.
        if not (_same(theirs[-len(ours) :], ours) or _same(theirs, ours[1:])):
            raise UsageError(
                f"the server's tokenizer is another: it reads {text[:24]!r}… as {len(theirs)} other ids",
                hint="give the tokenizer.json of the very model that the server runs",
                code="other_tokenizer",
            )


def _same(theirs: Sequence[int], ours: Sequence[int]) -> bool:
    return len(theirs) == len(ours) and all(a in (UNKNOWN, b) for a, b in zip(theirs, ours, strict=True))


async def _read_by_server(link: VerifierLink, dialect: Dialect, model: str, text: str) -> tuple[int, ...]:
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        found = (await link.post("/tokenize", body)).get("tokens")
        if isinstance(found, list) and all(isinstance(token, int) for token in found):
            return tuple(found)
    except EdgeRuntimeError as problem:
        if problem.code not in ("no_such_path", "refused"):
            raise
    return dialect.read_text_ids(await link.post(dialect.path, dialect.text_body(text)))
