"""AsyncRemoteVerifier: greedy generation over somebody else's server, with drafts made on this device.

Knows: what a caller may ask for, the one tokenizer, one drafter. Does not know: formats, HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from edge_runtime.bundle.hashing import sha256_digest
from edge_runtime.errors import ConfigError, UsageError
from edge_runtime.sdk.closing import AsyncClosing
from edge_runtime.sdk.results import Result
from edge_runtime.sdk.verifier_check import AUTO, DIALECTS, Server, examine
from edge_runtime.sdk.verifier_drafter import RemoteDrafter
from edge_runtime.sdk.verifier_link import SILENCE_SECONDS, LinkOptions, VerifierLink
from edge_runtime.sdk.verifier_stream import Parts, VerifiedStream
from edge_runtime.speculative.verifiers.pace import Pace
from edge_runtime.speculative.verifiers.progress import Ends, Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)
DEFAULT_MAX_TOKENS = 256
NO_SAMPLING = "sampling_not_supported"
GREEDY_ONLY = (
    "tokens are the server's likeliest ones (greedy); where two are almost equally likely, a server may decide"
    " otherwise while it decodes by itself"
)


class VerifyOptions(TypedDict, total=False):
    """Keyword arguments of generate and stream."""

    max_tokens: int
    temperature: float  # 0, and nothing else
    stop: str | Sequence[str]
    ignore_eos: bool
    seed: int  # of no effect: greedy decoding draws nothing


class AsyncRemoteVerifier(AsyncClosing):
    """`async with AsyncRemoteVerifier(url, tokenizer="tokenizer.json") as server: await server.generate("def f")`.

    The server is examined before the first request. One request at a time drafts; others wait for it.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: str | Path,
        draft: str | Path = "auto",
        dialect: str = AUTO,
        model: str = "",
        stop_token_ids: Iterable[int] = (),
        api_key: str = "",
        ca_file: Path | None = None,
        timeout_seconds: float = SILENCE_SECONDS,
        allow_plain_http: bool = False,
    ) -> None:
        """`tokenizer`: the server's own tokenizer.json, a directory that has one, or a bundle.

        `draft`: "auto", "suffix", "none", or a draft model's bundle with that tokenizer. `dialect`: "auto", "vllm",
        "sglang", "prefixes" or "echo" (docs/verifiers.md). `stop_token_ids`: ids that end a text, beside those that the
        server stops at. `ca_file`: authorities to trust instead of the system's. `timeout_seconds`: longest silence of
        the server. `allow_plain_http`: send the key even where everybody on the way can read it.

        Raises UsageError and ConfigError for what can be seen without asking the server.
        """
        if dialect not in DIALECTS:
            raise UsageError(f"unknown dialect {dialect!r}", hint=f"choose one of {', '.join(DIALECTS)}")
        self.tokenizer, digest = read_tokenizer(Path(tokenizer))
        self._link = VerifierLink(url, LinkOptions(api_key, timeout_seconds, ca_file, allow_plain_http))
        self._dialect = dialect
        self._wanted_model = model
        self._pace = Pace()
        self._drafter = RemoteDrafter(draft, digest)
        self._ends = Ends(_special_ids(self.tokenizer), set(stop_token_ids))
        self._server: Server | None = None
        self._turn = asyncio.Lock()

    async def close(self) -> None:
        await self._drafter.close()
        await self._link.close()

    @property
    def url(self) -> str:
        return self._link.url

    @property
    def requests(self) -> int:
        """HTTP requests sent so far, the examination's included."""
        return self._link.requests

    async def server(self) -> Server:
        """What the server is; examined once. Raises what `verifier_check.examine` raises."""
        if self._server is None:
            found = await examine(
                self._link,
                dialect=self._dialect,
                model=self._wanted_model,
                tokenizer=self.tokenizer,
                pace=self._pace,
            )
            await self._drafter.open()
            self._server = found
            log.info("%s verifies as %s: %s", self.url, found.dialect.name, GREEDY_ONLY)
        return self._server

    async def generate(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> Result:
        """Continue a prompt (text or token ids) and wait for the whole."""
        async with self.stream(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def stream(self, prompt: str | Sequence[int], **options: Unpack[VerifyOptions]) -> VerifiedStream:
        """`async for token in verifier.stream(prompt)`. Raises UsageError for options that are not greedy."""
        check_greedy(options)

        async def open_parts() -> Parts:
            await self._turn.acquire()
            try:
                return await self._parts(prompt, options)
            except BaseException:
                self._turn.release()
                raise

        return VerifiedStream(open_parts, self._turn.release)

    async def _parts(self, prompt: str | Sequence[int], options: VerifyOptions) -> Parts:
        server = await self.server()
        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else [int(one) for one in prompt]
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        stop = options.get("stop") or ()
        return Parts(
            link=self._link,
            dialect=server.dialect,
            pace=self._pace,
            drafter=self._drafter,
            progress=Progress(
                ids,
                max_tokens=options.get("max_tokens", DEFAULT_MAX_TOKENS),
                max_context=server.max_context,
                ends=self._ends,
                ignore_end=options.get("ignore_eos", False),
            ),
            tokenizer=self.tokenizer,
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            model=server.model,
        )


def check_greedy(options: VerifyOptions) -> None:
    """Raises UsageError for what only a sampler of the server's own could do."""
    unknown = set(options) - set(VerifyOptions.__annotations__)
    if unknown:
        raise UsageError(
            f"a remote verifier has no option {sorted(unknown)[0]!r}: it decodes greedily, without penalties",
            hint=f"options are {', '.join(VerifyOptions.__annotations__)}; ask the server itself for others",
            code=NO_SAMPLING,
        )
    if options.get("temperature", 0) != 0:
        raise UsageError(
            "a remote verifier can't sample: log-probabilities only tell which token is likeliest",
            hint="leave the temperature at 0, or ask the server itself, without drafts",
            code=NO_SAMPLING,
        )
    if options.get("max_tokens", 1) < 1:
        raise UsageError("max_tokens must be at least 1")


def read_tokenizer(path: Path) -> tuple[Tokenizer, str]:
    """A tokenizer and its digest. Raises ConfigError where there is none."""
    from tokenizers import Tokenizer

    try:
        if (path / "manifest.json").is_file():
            from edge_runtime.bundle.bundle import Bundle

            content = Bundle.open(path).tokenizer_json()
        else:
            content = (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
        return Tokenizer.from_str(content.decode()), sha256_digest(content)
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"{path}: no tokenizer can be read: {problem}",
            hint="give the tokenizer.json of the model that the server runs",
        ) from None
    except Exception as problem:  # the tokenizers library raises bare Exceptions
        if type(problem) is not Exception:
            raise
        raise ConfigError(f"{path} is no tokenizer.json: {problem}") from None


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, entry in added.items() if entry.special)
