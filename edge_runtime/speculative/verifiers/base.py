"""What a server is asked about drafts, what it answers, and what a dialect must do to carry both.

A request is whole in itself: certain ids, then drafts. The server says which id it finds likeliest after each of them.
So a request may be sent twice, and a lost answer costs nothing but time.

Knows: ids, windows and verdicts; how JSON from a stranger is taken apart. Does not know: HTTP, drafters, time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from edge_runtime.errors import ProtocolError

Json = dict[str, Any]

MAX_IDS = 1 << 31
_MOST_DIGITS = 12
UNKNOWN = -1  # the server prefers another id, and does not say which in a way that can be read
NO_PROMPT_LOGPROBS = "no_prompt_logprobs"
INCONSISTENT = "inconsistent_logprobs"


@dataclass(frozen=True, slots=True)
class Window:
    """`drafts` (0 or more) follow `ids` (at least one)."""

    ids: tuple[int, ...]
    drafts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a window needs at least one id to start from")

    @property
    def prompt(self) -> list[int]:
        return [*self.ids, *self.drafts]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`own[i]`: the server's likeliest id after the window's ids and its first i drafts, or UNKNOWN.

    One more than drafts: the last one is the id that the server generated after all of them. `ended`: the server would
    stop with that one. `cached_tokens`: of the prompt, those not computed anew; None where it does not say.
    """

    own: tuple[int, ...]
    ended: bool = False
    cached_tokens: int | None = None

    def accepted(self, window: Window) -> int:
        """Drafts that are the server's own choice, each given that all before it are."""
        pairs = zip(window.drafts, self.own, strict=False)
        return next((i for i, (draft, own) in enumerate(pairs) if draft != own), len(window.drafts))


@dataclass(frozen=True, slots=True)
class Decoded:
    """A piece of the server's own decoding. `ended`: the text ends with it; `finished`: so does the answer."""

    ids: tuple[int, ...]
    ended: bool = False
    finished: bool = False


class Dialect(Protocol):
    """One way to ask. All methods are pure; those that read raise ProtocolError for what can't be understood."""

    name: str
    path: str

    def verify_body(self, window: Window) -> Json: ...

    def read_verdict(self, window: Window, answer: Json) -> Verdict: ...

    def decode_body(self, ids: tuple[int, ...], max_tokens: int, *, ignore_end: bool) -> Json:
        """For a stream of server-sent events."""
        ...

    def read_event(self, event: Json, have: int) -> Decoded:
        """What is new in one event, `have` ids having come before."""
        ...

    def text_body(self, text: str) -> Json:
        """Asks how the server's tokenizer reads `text`, without special tokens."""
        ...

    def read_text_ids(self, answer: Json) -> tuple[int, ...]:
        """Those ids, some UNKNOWN; the first may be missing where the server says nothing about the first place."""
        ...

    def prompt_tokens(self, window: Window) -> int:
        """Prompt tokens that the server is sent, and may charge for."""
        ...

    def computed_tokens(self, window: Window) -> int:
        """Prompt tokens that the server has to compute, if its prefix cache holds what earlier windows had."""
        ...


# ---------------------------------------------------------------- taking JSON apart


def at(value: Any, *path: str | int) -> Any:
    """The value at `path`. Raises ProtocolError with the path where there is none."""
    for step, key in enumerate(path):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise ProtocolError(f"the server's answer has no {_spelled(path[: step + 1])}") from None
    return value


def list_at(value: Any, *path: str | int) -> list[Any]:
    found = at(value, *path)
    if not isinstance(found, list):
        raise ProtocolError(f"the server's answer: {_spelled(path)} is not a list")
    return found


def object_at(value: Any, *path: str | int) -> Json:
    found = at(value, *path)
    if not isinstance(found, dict):
        raise ProtocolError(f"the server's answer: {_spelled(path)} is not an object")
    return found


def as_id(value: Any) -> int:
    """A token id, as a number or as the text of one (keys of JSON objects are text)."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) >= MAX_IDS:
        raise ProtocolError(f"the server's answer names a token {text[:40]!r}, which is no id")
    return int(text)


def _spelled(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")
