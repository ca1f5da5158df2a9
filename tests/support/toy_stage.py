"""A stage around a real PipelineState: its queue of work, and a toy engine whose rows depend on everything before them.

Knows: what an engine promises a PipelineState (pages by name, works in pieces, side rows). Does not know: links.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.agent.pipeline_events import (
    CancelRows,
    DropRows,
    Ignore,
    Load,
    Loaded,
    OpenRows,
    RowsOpened,
    RunRows,
    Send,
    Unload,
    Work,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.row_queue import still_wanted
from edge_runtime.core import SessionId, Token
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import PAGE_NAME_BYTES, Message

LAYERS = 3


VOCAB = 97


STOP_ID = 13


PRIME = 65521


def layer_rows(layer: int, before: Sequence[int], values: Sequence[int]) -> list[int]:
    """The rows of `values`, one after the other behind `before`: each depends on everything in front of it."""
    total, length, rows = sum(before), len(before), []
    for value in values:
        total += value
        length += 1
        rows.append((31 * value + 17 * total + 7 * length + layer) % PRIME)
    return rows


def plain_loop(prompt: list[int], max_rows: int) -> list[int]:
    """The specification: one row at a time, all layers, no stages."""
    ids = list(prompt)
    while len(ids) < max_rows:
        values = list(ids)
        for layer in range(LAYERS):
            values = layer_rows(layer, (), values)
        ids.append(values[-1] % VOCAB)
        if ids[-1] == STOP_ID:
            break
    return ids


def page_names(ids: list[int]) -> list[bytes]:
    """Of the full pages: equal where everything before is equal."""
    ends = range(PAGE_TOKENS, len(ids) + 1, PAGE_TOKENS)
    return [hashlib.sha256(repr(ids[:end]).encode()).digest()[:PAGE_NAME_BYTES] for end in ends]


@dataclass
class Held:
    """What a toy engine keeps of a session: its ids, and one value per row and layer."""

    ids: list[int]
    layers: list[list[int]]
    names: list[bytes]


def after_cancel(work: Work | RowsOpened, order: CancelRows) -> list[Work | RowsOpened]:
    if isinstance(work, RowsOpened) or work.session != order.session:
        return [work]
    return [*still_wanted((work,), order)]


@dataclass
class Device:
    """A PipelineState, its queue of work and a toy engine."""

    name: str
    send: Callable[[str, str, Message, object], None]
    state: PipelineState = field(default_factory=PipelineState)
    queue: list[Work | RowsOpened] = field(default_factory=list)
    kv: dict[SessionId, Held] = field(default_factory=dict)
    pages: dict[bytes, tuple[list[int], list[list[int]]]] = field(default_factory=dict)  # rows of a page
    layers: range = range(0)
    ignored: int = 0
    reused_rows: int = 0
    most_queued_rows: int = 0

    def handle(self, event: object) -> None:
        for instruction in self.state.handle(event):
            match instruction:
                case Send():
                    self.send(self.name, instruction.to, instruction.message, instruction.rows)
                case Load(order):
                    self.reset()
                    self.layers = range(order.first_layer, order.last_layer + 1)
                    self.handle(Loaded(order.lease, "toy", True, 1, 1000, VOCAB))
                case Unload():
                    self.reset()
                case OpenRows():
                    self.open(instruction)
                case RunRows(work):
                    self.queue.append(work)
                    waiting = sum(len(w.ids) for w in self.queue if isinstance(w, Work))
                    self.most_queued_rows = max(self.most_queued_rows, waiting)
                case CancelRows():
                    self.queue = [kept for w in self.queue for kept in after_cancel(w, instruction)]
                case DropRows():
                    self.queue = [w for w in self.queue if w.session != instruction.session]
                    self.drop(instruction)
                case Ignore():
                    self.ignored += 1

    def reset(self) -> None:
        self.queue.clear()
        self.kv.clear()
        self.pages.clear()

    def open(self, order: OpenRows) -> None:
        assert order.session not in self.kv, "opened twice"
        held = self.kv[order.session] = Held([], [[] for _ in self.layers], list(order.page_names))
        for name in order.page_names:
            if name not in self.pages:
                break
            ids, values = self.pages[name]
            held.ids += ids
            for layer, more in zip(held.layers, values, strict=True):
                layer += more
        if order.page_names:
            self.queue.append(RowsOpened(self.state.lease, order.session, len(held.ids)))

    def drop(self, order: DropRows) -> None:
        held = self.kv.pop(order.session, None)
        if held is None:
            return
        start = order.first_page * PAGE_TOKENS
        same = held.ids[start : start + len(order.ids)]
        while same != list(order.ids[: len(same)]):
            same.pop()
        held.names = held.names[: order.first_page] + list(order.page_names)
        self.keep(held, min(len(held.ids), start + len(same)))

    def keep(self, held: Held, rows: int) -> None:
        """Pages that are full of rows below `rows` outlive the session."""
        for index, name in enumerate(held.names[: rows // PAGE_TOKENS]):
            part = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
            self.pages.setdefault(name, (held.ids[part], [layer[part] for layer in held.layers]))

    def forget(self, rng: random.Random) -> None:
        for name in [name for name in self.pages if rng.random() < 0.5]:
            del self.pages[name]

    def run(self, choice: int) -> None:
        """One step of the engine: the oldest work of some session, or a first piece of it."""
        sessions = list(dict.fromkeys(w.session for w in self.queue))
        session = sessions[choice % len(sessions)]
        index, work = next((i, w) for i, w in enumerate(self.queue) if w.session == session)
        if isinstance(work, RowsOpened):
            del self.queue[index]
            self.reused_rows += work.rows
            self.handle(work)
            return
        if work.is_divisible and len(work.ids) > 1 and choice % 3 == 0:
            work, self.queue[index] = work.split(1 + choice % (len(work.ids) - 1))
        else:
            del self.queue[index]
        held = self.kv[session]
        assert work.turn >= self.state.sessions[session].turn, "a dead row was started"
        assert work.base_row <= len(held.ids), "a stage was given rows it can't place"
        held.ids[work.base_row :] = work.ids
        values = (
            list(work.ids + work.sides.ids) if work.hidden is None else [int(v) for v in work.hidden[:, 0]]
        )
        count = len(work.ids)
        for layer, cache in zip(self.layers, held.layers, strict=True):
            del cache[work.base_row :]
            chain = layer_rows(layer, cache, values[:count])
            cache += values[:count]
            sides = [
                layer_rows(layer, cache[: left_at + 1], [values[count + side] for side in path])[-1]
                for left_at, path in map(work.sides.path, range(len(work.sides)))
            ]
            values = chain + sides
        self.keep(held, len(held.ids))
        rows = np.array(values, np.float32)[:, None]
        self.handle(WorkFinished(work, rows, self.sampled(work, values)))

    @staticmethod
    def sampled(work: Work, values: list[int]) -> tuple[Token, ...]:
        """As TailSession says."""
        count, tokens = len(work.ids), []
        parent = work.base_row + count - work.logit_rows - 1
        for index in range(count - work.logit_rows, count):
            if tokens and work.ids[index] != tokens[-1].id:
                break
            parent += 1
            tokens.append(Token(parent + 1, values[index] % VOCAB))
        while tokens and (side := work.sides.child(parent, tokens[-1].id)) is not None:
            tokens.append(Token(tokens[-1].position + 1, values[count + side] % VOCAB))
            parent = ~side
        return tuple(tokens)
