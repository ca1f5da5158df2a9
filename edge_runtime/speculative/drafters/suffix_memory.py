"""What one user's past requests produced, for the suffix drafter: one object per user, never shared.

Whoever could draft from another's outputs would learn them from what is proposed and from how long it takes. So there
is no key and no lookup by user here: the object is the user's, in the user's process, and only its owner writes it to
a file.
Knows: finished outputs, a budget, one file. Does not know: who the user is, requests in progress.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_runtime.errors import ConfigError, UsageError
from edge_runtime.speculative.drafters.suffix_paths import SEPARATOR
from edge_runtime.speculative.drafters.suffix_tree import (
    Continuation,
    Ids,
    Node,
    SuffixTree,
)

DEFAULT_BYTES = 8 << 20
_LEAST_BYTES = 4096
_KEPT_SHARE = 0.875  # when it is full: forgetting costs as much as learning, so some room is made at once
_FORMAT = "edge-runtime suffix memory 1"
_MOST_HEADER_BYTES = 4096

Choose = Callable[[SuffixTree, Iterator[Node]], Continuation | None]


class SuffixMemory:
    """Outputs in the order they came, the oldest forgotten first. Safe to use from several threads (one user may have
    several requests)."""

    def __init__(self, budget_bytes: int = DEFAULT_BYTES, *, tokenizer: str = "") -> None:
        """`tokenizer`: digest of the tokenizer whose ids these are; checked when a file is read."""
        if budget_bytes < _LEAST_BYTES:
            raise UsageError(
                f"a suffix memory needs at least {_LEAST_BYTES} bytes, not {budget_bytes}",
                hint="pass no memory to keep nothing between requests",
            )
        self.budget_bytes = budget_bytes
        self.tokenizer = tokenizer
        self._tree = SuffixTree()
        self._lock = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        return self._tree.memory_bytes

    @property
    def places_looked_at(self) -> int:
        return self._tree.places_looked_at

    def __len__(self) -> int:
        return len(self._tree)

    def learn(self, output_ids: Sequence[int]) -> None:
        """A request is over. Of an output larger than the budget the end is kept."""
        if not len(output_ids):
            return
        with self._lock:
            self._tree.append([SEPARATOR, *output_ids])
            if self._tree.memory_bytes > self.budget_bytes:
                self._forget()

    def best(self, tail: Ids, choose: Choose) -> Continuation | None:
        """What `choose` makes of the nodes that match the end of a request."""
        with self._lock:
            return choose(self._tree, self._tree.find(tail, is_own_end=False))

    def clear(self) -> None:
        with self._lock:
            self._tree = SuffixTree()

    def _forget(self) -> None:
        """The oldest texts, whole, until some room is free; of a single one its beginning."""
        while self._tree.memory_bytes > self.budget_bytes * _KEPT_SHARE and len(self._tree) > 1:
            share = self.budget_bytes * _KEPT_SHARE / self._tree.memory_bytes
            least = max(1, int(len(self._tree) * (1 - share)))
            starts = np.flatnonzero(self._tree.ids() == SEPARATOR)
            later = starts[starts >= least]
            self._tree.forget_before(int(later[0]) if len(later) else least)

    # ------------------------------------------------------------ kept by its owner

    def save(self, path: Path) -> None:
        """Replace `path`, readable by its owner alone. Nothing is ever written unless this is called."""
        with self._lock:
            ids = self._tree.ids().astype("<i4").tobytes()
        header = json.dumps({"format": _FORMAT, "tokenizer": self.tokenizer}).encode() + b"\n"
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(header + ids)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, budget_bytes: int = DEFAULT_BYTES, *, tokenizer: str = "") -> SuffixMemory:
        """What `save` wrote; empty where there is no file. Raises ConfigError for a file that is something else."""
        memory = cls(budget_bytes, tokenizer=tokenizer)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return memory
        line, _, body = data.partition(b"\n")
        hint = "remove the file: it only makes drafts better"
        try:
            header = json.loads(line[:_MOST_HEADER_BYTES])
            is_ours = isinstance(header, dict) and header.get("format") == _FORMAT
        except ValueError:
            is_ours = False
        if not is_ours or len(body) % 4:
            raise ConfigError(f"{path} is not a suffix memory", hint=hint)
        if header.get("tokenizer") != tokenizer:
            raise ConfigError(f"{path} was written with another tokenizer", hint=hint)
        ids = np.frombuffer(body, "<i4")
        if (ids < SEPARATOR).any():
            raise ConfigError(f"{path} is damaged", hint=hint)
        memory._tree.append(ids.tolist())
        if memory.memory_bytes > budget_bytes:
            memory._forget()
        return memory
