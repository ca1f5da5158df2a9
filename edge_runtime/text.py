"""From token ids to text, one id at a time.

Text is given out once it is certain: not inside a character whose bytes are still coming, and not inside what may turn
out to be a stop string. The same ids always give the same pieces, so a stream that is replayed reads the same.

Knows: detokenisation and stop strings. Does not know: sessions, tokens' probabilities, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)
MAX_UNFINISHED = 3  # replacement characters that an unfinished character can show up as
CONTEXT_TOKENS = 8  # of the prompt: a leading space belongs to the text only after a word
MAX_WINDOW_TOKENS = 64


class Decoder(Protocol):
    """What this module needs of a tokenizer (`tokenizers.Tokenizer` has it)."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Decodes a short window of ids that ends at the newest; what it adds to the window's old text is new."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])
        self._given_chars = len(_finished(self._decode()))  # of the window's text
        self._anchor = len(self._window)  # where the window will start once its text is all out

    def push(self, token_id: int) -> str:
        """The text that became certain with this id."""
        self._window.append(token_id)
        text = self._decode()
        certain = _finished(text)
        new = certain[self._given_chars :]
        self._given_chars = max(self._given_chars, len(certain))
        if len(self._window) > MAX_WINDOW_TOKENS:  # bytes that make no character, on and on: let them out
            new += text[self._given_chars :]
            self._slide()
        elif len(certain) == len(text):
            self._slide()
        return new

    def flush(self) -> str:
        """What is left at the end, complete or not."""
        text = self._decode()
        new = text[self._given_chars :]
        self._given_chars = len(text)
        return new

    def _slide(self) -> None:
        """Keep the last id or so as context. It must show something, or a decoder would strip the next one's space."""
        kept = self._window[self._anchor :]
        if not kept or not self._decoder.decode(kept, skip_special_tokens=True):
            if len(self._window) > MAX_WINDOW_TOKENS:
                self._window = self._window[-CONTEXT_TOKENS:]
                self._given_chars = len(self._decode())
            self._anchor = len(self._window)
            return
        self._window = kept
        self._anchor = len(kept)
        self._given_chars = len(self._decode())

    def _decode(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=True) if self._window else ""


def _finished(text: str) -> str:
    """Without the replacement characters at the end that may still become a character."""
    end = len(text)
    while end > 0 and len(text) - end < MAX_UNFINISHED and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


class StopMatcher:
    """Finds the first stop string across pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(certain text, whether a stop string was found). After a find, nothing is held."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return certain, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    is_stop: bool  # a stop string was completed: this is the last token


class TextStream:
    """Detokenizer and stop strings of one generation."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decoder, prompt_ids)
        self._matcher = StopMatcher(stops)

    def push(self, token_id: int, *, is_last: bool) -> Piece:
        """`is_last`: the tail says that no token follows, so whatever is left comes out."""
        text, stopped = self._matcher.push(self._detokenizer.push(token_id))
        if stopped or not is_last:
            return Piece(text, stopped)
        rest, stopped = self._matcher.push(self._detokenizer.flush())
        if stopped:
            return Piece(text + rest, True)
        return Piece(text + rest + self._matcher.flush(), False)
