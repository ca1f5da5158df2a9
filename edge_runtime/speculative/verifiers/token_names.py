"""Which id a server means that names tokens by "token_id:17" or by their text.

Knows: one tokenizer's vocabulary. Does not know: answers.
"""

from __future__ import annotations

from typing import Protocol

from edge_runtime.speculative.verifiers.base import UNKNOWN, as_id

_PREFIX = "token_id:"


class Vocabulary(Protocol):
    """What is needed of a tokenizer (`tokenizers.Tokenizer` has it)."""

    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class TokenNames:
    """`id_of` answers UNKNOWN where no id, or more than one, has that text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._by_text: dict[str, int] | None = None  # made when a server first names a token by its text

    def id_of(self, name: str) -> int:
        number = name.removeprefix(_PREFIX)
        if number != name:
            return as_id(number)
        if self._by_text is None:
            self._by_text = self._read()
        return self._by_text.get(name, UNKNOWN)

    def _read(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for token in range(self._vocabulary.get_vocab_size()):
            text = self._vocabulary.decode([token], skip_special_tokens=False)
            found[text] = UNKNOWN if text in found else token
        return found
