"""Text that repeats itself: documents in which earlier spans come again, verbatim or edited.

Knows: how a span is edited (renamed identifiers, lines gone, new or moved), how a document of copies is built, and
which of its tokens are worth learning.
Does not know: models. All randomness comes from the generator it is given.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from text import Ids
from tokenizers import Tokenizer

IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z_0-9]{2,}\b")
AFFIXES = ("new_{}", "{}_new", "old_{}", "my_{}", "{}2", "_{}", "{}_value", "{}s", "base_{}")
MIN_SPAN_TOKENS = 24
MIN_EDITED_TOKENS = 64  # room for a name that is changed to come more than once
MAX_EDITS = 3
MIN_REWRITTEN_TOKENS, MAX_REWRITTEN_TOKENS = (
    100,
    480,
)  # of a span that comes again at once, with a name changed
COPY_WEIGHT = 4.0  # of a copied token in the loss, against 1 for a new one
RENAMED_SHARE = 0.9  # of those copies, the others are verbatim
ELSEWHERE_TOKENS = 64  # of the text that new names and lines are taken from
BETWEEN = "\n\n\n"  # a span and its rewritten copy

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class CopyMixture:
    """Rows for training: `plain_share` windows of the text as it is, the others documents of copies."""

    text: Ids
    tokenizer: Tokenizer
    plain_share: float = 0.4
    copy_share: float = 0.6  # of the pieces of a document
    edited_share: float = 0.4  # of the copies
    scrambled_share: float = 0.0  # of the documents: new text in random order, only copies can be foreseen
    rewritten_share: float = 0.0  # of the documents: each span is followed by itself with a name changed

    def rows(self, rng: np.random.Generator, count: int, tokens: int) -> tuple[Ids, Weights]:
        """Int64 [count, tokens] and what each token counts in the loss, float32 of the same shape."""
        rows = [self._row(rng, tokens) for _ in range(count)]
        return np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows])

    def _row(self, rng: np.random.Generator, tokens: int) -> tuple[Ids, Weights]:
        if rng.random() < self.plain_share:
            return self.window(rng, tokens), np.ones(tokens, np.float32)
        if rng.random() < self.rewritten_share:
            return self.rewritten_document(rng, tokens)
        return self.document(rng, tokens)

    def window(self, rng: np.random.Generator, tokens: int) -> Ids:
        start = int(rng.integers(0, len(self.text) - tokens))
        return self.text[start : start + tokens]

    def document(self, rng: np.random.Generator, tokens: int) -> tuple[Ids, Weights]:
        """New text and copies of anything before them, in turn, `tokens` long, and its weights.

        Nobody can foresee a scrambled token, nor where a scrambled copy is taken from: they count nothing.
        """
        is_scrambled = rng.random() < self.scrambled_share
        document, weights = self.window(rng, 0), np.zeros(0, np.float32)
        while len(document) < tokens:
            if len(document) and rng.random() < self.copy_share:
                piece = self.copy(rng, document)
                counts = np.full(len(piece), COPY_WEIGHT, np.float32)
                counts[:1] = not is_scrambled
            else:
                piece = self.window(rng, span_tokens(rng, tokens // 2))
                piece = scrambled(rng, piece) if is_scrambled else piece
                counts = np.full(len(piece), not is_scrambled, np.float32)
            document, weights = np.concatenate([document, piece]), np.concatenate([weights, counts])
        return document[:tokens], weights[:tokens]

    def rewritten_document(self, rng: np.random.Generator, tokens: int) -> tuple[Ids, Weights]:
        """Some text, then spans that begin with a function where there is one, each followed by its rewritten copy."""
        document = self.window(rng, int(rng.integers(0, MIN_REWRITTEN_TOKENS)))
        weights = np.ones(len(document), np.float32)
        most = min(MAX_REWRITTEN_TOKENS, 2 * tokens // 5)
        while len(document) < tokens:
            text = from_a_function(self._text(self.window(rng, span_tokens(rng, most, MIN_REWRITTEN_TOKENS))))
            again = text
            if rng.random() < RENAMED_SHARE:
                again = rename(rng, text, self._text(self.window(rng, ELSEWHERE_TOKENS)), most_used=True)
            first, second = self._ids(text + BETWEEN), self._ids(again + BETWEEN)
            counts = np.full(len(first) + len(second), COPY_WEIGHT, np.float32)
            counts[: len(first) + 1] = 1.0
            document, weights = np.concatenate([document, first, second]), np.concatenate([weights, counts])
        return document[:tokens], weights[:tokens]

    def copy(self, rng: np.random.Generator, document: Ids) -> Ids:
        is_edited = rng.random() < self.edited_share
        length = span_tokens(rng, len(document), MIN_EDITED_TOKENS if is_edited else MIN_SPAN_TOKENS)
        start = int(rng.integers(0, len(document) - length + 1))
        span = document[start : start + length]
        if not is_edited:
            return span
        return self._ids(edit(rng, self._text(span), self._text(self.window(rng, ELSEWHERE_TOKENS))))

    def _text(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def _ids(self, text: str) -> Ids:
        return np.array(self.tokenizer.encode(text).ids, np.int64)


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


def from_a_function(text: str) -> str:
    """`text` from its first function on, or from its first whole line."""
    found = re.search(r"^[ ]*(async )?def ", text, re.MULTILINE)
    start = found.start() if found and found.start() < len(text) // 2 else text.find("\n") + 1
    return text[start:].rstrip()


def rename(rng: np.random.Generator, text: str, elsewhere: str, most_used: bool = False) -> str:
    """One identifier, everywhere in `text`, to a variant of itself or to one from `elsewhere`; often used ones most."""
    names = identifiers(text)
    if not names:
        return text
    old = max(names, key=names.count) if most_used and rng.random() < 0.5 else str(rng.choice(names))
    others = identifiers(elsewhere)
    is_foreign = bool(others) and rng.random() < 0.4
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
    """Every use of one, in order, keywords left out."""
    return [name for name in IDENTIFIER.findall(text) if not keyword.iskeyword(name)]
