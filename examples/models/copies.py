"""Text that repeats itself: documents in which earlier spans come again, verbatim or edited.

Knows: how a span is edited (renamed identifiers, lines gone, new or moved) and how a document of copies is built.
Does not know: models. All randomness comes from the generator it is given.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import numpy as np
from text import Ids
from tokenizers import Tokenizer

IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z_0-9]{2,}\b")
AFFIXES = ("new_{}", "{}_new", "old_{}", "my_{}", "{}2", "_{}", "{}_value", "{}s", "base_{}")
MIN_SPAN_TOKENS = 24
MAX_EDITS = 3


@dataclass(frozen=True)
class CopyMixture:
    """Rows for training: `plain_share` windows of the text as it is, the others documents of copies."""

    text: Ids
    tokenizer: Tokenizer
    plain_share: float = 0.4
    copy_share: float = 0.5  # of the pieces of a document
    edited_share: float = 0.5  # of the copies
    scrambled_share: float = 0.0  # of the documents: new text in random order, only copies can be foreseen

    def rows(self, rng: np.random.Generator, count: int, tokens: int) -> Ids:
        """Int64 [count, tokens]."""
        return np.stack([self._row(rng, tokens) for _ in range(count)])

    def _row(self, rng: np.random.Generator, tokens: int) -> Ids:
        return self.window(rng, tokens) if rng.random() < self.plain_share else self.document(rng, tokens)

    def window(self, rng: np.random.Generator, tokens: int) -> Ids:
        start = int(rng.integers(0, len(self.text) - tokens))
        return self.text[start : start + tokens]

    def document(self, rng: np.random.Generator, tokens: int) -> Ids:
        """New text and copies of anything before them, in turn, `tokens` long."""
        is_scrambled = rng.random() < self.scrambled_share
        document = self.window(rng, 0)
        while len(document) < tokens:
            piece = self.window(rng, span_tokens(rng, tokens // 2))
            piece = scrambled(rng, piece) if is_scrambled else piece
            if len(document) and rng.random() < self.copy_share:
                piece = self.copy(rng, document)
            document = np.concatenate([document, piece])
        return document[:tokens]

    def copy(self, rng: np.random.Generator, document: Ids) -> Ids:
        length = span_tokens(rng, len(document))
        start = int(rng.integers(0, len(document) - length + 1))
        span = document[start : start + length]
        if rng.random() >= self.edited_share:
            return span
        text = self.tokenizer.decode(span.tolist(), skip_special_tokens=False)
        edited = edit(rng, text, self.tokenizer.decode(self.window(rng, 64).tolist()))
        return np.array(self.tokenizer.encode(edited).ids, np.int64)


def scrambled(rng: np.random.Generator, piece: Ids) -> Ids:
    """As many tokens without order: of all of them, or of so few that only long matches tell where a copy goes on."""
    if rng.random() < 0.5:
        return rng.permutation(piece)
    alphabet = rng.choice(piece, span_tokens(rng, len(piece), least=4))
    return rng.choice(alphabet, len(piece))


def span_tokens(rng: np.random.Generator, most: int, least: int = MIN_SPAN_TOKENS) -> int:
    """Log-uniform between `least` and `most` (or `most` where that is less)."""
    if most <= least:
        return most
    return int(np.exp(rng.uniform(np.log(least), np.log(most))))


def edit(rng: np.random.Generator, text: str, elsewhere: str) -> str:
    """`text` after one to MAX_EDITS edits; names and lines that come in are taken from `elsewhere`."""
    for _ in range(int(rng.integers(1, MAX_EDITS + 1))):
        text = rename(rng, text, elsewhere) if rng.random() < 0.5 else change_lines(rng, text, elsewhere)
    return text


def rename(rng: np.random.Generator, text: str, elsewhere: str) -> str:
    """One identifier, everywhere in `text`, to a variant of itself or to one from `elsewhere`."""
    names = identifiers(text)
    if not names:
        return text
    old = str(rng.choice(names))
    others = identifiers(elsewhere)
    is_foreign = bool(others) and rng.random() < 0.5
    new = str(rng.choice(others)) if is_foreign else str(rng.choice(AFFIXES)).format(old)
    return re.sub(rf"\b{re.escape(old)}\b", new, text)


def change_lines(rng: np.random.Generator, text: str, elsewhere: str) -> str:
    """One to three neighbouring lines taken out, replaced, or put after a line that stays."""
    lines = text.split("\n")
    foreign = elsewhere.split("\n")[1:-1]
    at = int(rng.integers(0, len(lines)))
    count = int(rng.integers(1, 4))
    kind = rng.integers(0, 3)
    gone = 0 if kind == 2 else count
    coming = [] if kind == 0 else foreign[:count]
    return "\n".join([*lines[:at], *coming, *lines[at + gone :]])


def identifiers(text: str) -> list[str]:
    """Distinct, in order of first use, keywords left out."""
    return [name for name in dict.fromkeys(IDENTIFIER.findall(text)) if not keyword.iskeyword(name)]
