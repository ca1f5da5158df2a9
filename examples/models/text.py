"""The demo checkpoints' text: the Python standard library's own source, its tokenizer, its held-out files.

Knows: which files there are, which of them are held out, their token ids.
Does not know: models, or how the text is put in front of one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Ids = NDArray[np.int64]

VOCAB_SIZE = 4096
MAX_FILE_BYTES = 400_000
HELD_OUT_ONE_IN = 20
END_OF_TEXT = 0
# Newlines with their indentation, words and identifiers, up to three digits, punctuation, spaces.
WORDS = r"\n+ *| ?[A-Za-z_]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9_]+| +"


@dataclass(frozen=True)
class SourceFile:
    text: str
    is_held_out: bool


def standard_library() -> Iterator[SourceFile]:
    """Every file of the installed standard library that the models see; 5 % are held out by a hash of their path."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if "site-packages" in relative.parts or "encodings" in relative.parts:
            continue
        if path.stat().st_size < MAX_FILE_BYTES:
            hashed = int(hashlib.sha256(str(relative).encode()).hexdigest(), 16)
            text = path.read_text(encoding="utf-8", errors="replace")
            yield SourceFile(text, hashed % HELD_OUT_ONE_IN == 0)


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE of 4 096 ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Corpus:
    """Token ids of the training and the held-out files; each file ends with END_OF_TEXT."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: that of a checkpoint to go on from; without one it is trained on the training files."""
        files = list(standard_library())
        self.tokenizer = tokenizer or train_tokenizer(file.text for file in files if not file.is_held_out)
        train = self._encode(file.text for file in files if not file.is_held_out)
        np.random.default_rng(0).shuffle(train)  # type: ignore[arg-type]
        self.train: Ids = np.concatenate(train)
        self.held_out: Ids = np.concatenate(self._encode(file.text for file in files if file.is_held_out))
        self.held_out_bytes = sum(len(file.text.encode()) for file in files if file.is_held_out)

    def _encode(self, texts: Iterable[str]) -> list[Ids]:
        return [np.array([*e.ids, END_OF_TEXT], np.int64) for e in self.tokenizer.encode_batch(list(texts))]
