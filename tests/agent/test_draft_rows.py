"""Drafts over real layers: the committed tokens are those of plain decoding, to the last bit of a log-probability.

Rows that were guessed wrong are never read again: they become NaN as soon as they are known to be dead.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from coordinator.sessions.draft_ledger import positions_of
from edge_runtime.agent.pipeline_events import (
    COORDINATOR,
    CancelRows,
    DropRows,
    Event,
    Load,
    Loaded,
    OpenRows,
    Received,
    RunRows,
    Send,
    WorkFinished,
)
from edge_runtime.agent.pipeline_state import PipelineState
from edge_runtime.agent.row_queue import RowQueue
from edge_runtime.agent.step_batch import batch_of
from edge_runtime.agent.tail import TailSession
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import LayerRange, SamplingParams, SessionId, Token
from edge_runtime.engine.cpu import CpuStage
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import CloseSession, Draft, Feed, LoadStage, OpenSession, Tokens
from tests.support.tiny_bundle import TinyModel, build_tiny_bundle

VOCAB = 200
SESSION = SessionId(1)
MODEL = TinyModel()
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=1.0, top_p=0.95, seed=5),
    "penalties": SamplingParams(
        temperature=0.7,
        seed=9,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        top_logprobs=2,
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_tiny_bundle(tmp_path_factory.mktemp("drafts") / "bundle", MODEL)


class Device:
    """One stage: the rules, the queue, real layers; in the tail, a real sampler."""

    def __init__(
        self, bundle: Bundle, index: int, order: LoadStage, line: deque[tuple[str, Received]]
    ) -> None:
        self.name = order.devices[index]
        self.line = line
        layers = LayerRange(order.first_layer, order.last_layer)
        self.stage = CpuStage.load(bundle, layers, threads=1, kv_budget_bytes=1 << 20)
        self.stage._cache.pool[:] = np.nan
        self.state = PipelineState()
        self.queue = RowQueue(16)
        self.tail: TailSession | None = None
        self.rows_run = self.rows_poisoned = self.sides_run = 0
        self.handle(Received(COORDINATOR, order))

    def handle(self, event: Event) -> None:
        for instruction in self.state.handle(event):
            match instruction:
                case Load(order):
                    self.handle(Loaded(order.lease, "cpu", True, 1, 1000, VOCAB))
                case OpenRows():
                    self.stage.open(instruction.session, instruction.max_rows)
                    if instruction.sampling is not None:
                        self.tail = TailSession(instruction.sampling, VOCAB, instruction.prompt_rows)
                case RunRows(work):
                    self.queue.add(work)
                case CancelRows():
                    self.queue.cancel(instruction)
                    self.poison(instruction.turn)
                case DropRows():
                    self.queue.drop(instruction.session)
                    self.stage.drop(instruction.session)
                case Send(to, message, rows):
                    self.line.append((to, Received(self.name, message, rows)))

    def poison(self, first: int) -> None:
        """Rows from `first` on, in every layer."""
        pages = self.stage._cache.table.get(SESSION).pages
        for row in range(first, self.stage.rows(SESSION)):
            self.stage._cache.pool[pages[row // PAGE_TOKENS], :, :, row % PAGE_TOKENS] = np.nan
            self.rows_poisoned += 1

    def step(self) -> None:
        works = self.queue.take()
        if not works:
            return
        (work,) = works
        self.rows_run += work.row_count
        self.sides_run += len(work.sides)
        result = self.stage.run(batch_of(works))
        if self.tail is None:
            self.handle(WorkFinished(work, result))
            return
        tokens = self.tail.sample(work.base_row, work.ids, result, work.sides)
        self.handle(WorkFinished(work, None, tokens))


class Line:
    """Stages in a row, messages in order, and a coordinator that only listens."""

    def __init__(self, bundle: Bundle, boundaries: tuple[int, ...]) -> None:
        self.line: deque[tuple[str, Received]] = deque()
        edges = [0, *boundaries, bundle.manifest.num_layers]
        names = tuple(f"device-{index}" for index in range(len(edges) - 1))
        self.devices = {}
        for index, name in enumerate(names):
            order = LoadStage(1, "sha256:0", index, names, edges[index], edges[index + 1] - 1, 16)
            self.devices[name] = Device(bundle, index, order, self.line)
        self.first = names[0]
        self.tokens: list[Token] = []

    def tell(self, message: Draft | Feed | OpenSession | CloseSession, to: str = "") -> None:
        self.line.append((to or self.first, Received(COORDINATOR, message)))

    def generate(
        self, order: OpenSession, prompt: list[int], guess: random.Random | None, truth: list[int]
    ) -> None:
        self.tell(order)
        self.tell(Feed(SESSION, 1, 0, tuple(prompt)))
        while not (self.tokens and self.tokens[-1].finish):
            if guess is not None and guess.random() < 0.3:
                self.tell(self.draft(guess, len(prompt) + len(self.tokens), truth))
            for _ in range(len(self.line) if guess is None else guess.randint(0, len(self.line))):
                self.pass_on()
            for device in self.devices.values():
                if guess is None or guess.random() < 0.6:
                    device.step()
        for name in self.devices:
            self.tell(CloseSession(SESSION, 1), name)
        while self.line:
            self.pass_on()

    def pass_on(self) -> None:
        to, received = self.line.popleft()
        if to != COORDINATOR:
            self.devices[to].handle(received)
        elif isinstance(received.message, Tokens):
            self.tokens += received.message.tokens

    @staticmethod
    def draft(guess: random.Random, base: int, truth: list[int]) -> Draft:
        base = max(0, base + guess.randint(-2, 3))
        ids = [*truth[base : base + guess.randint(1, 12)], guess.randrange(VOCAB)]
        if guess.random() < 0.4:
            ids[guess.randrange(len(ids))] = guess.randrange(VOCAB)
        parents = list(range(base - 1, base + len(ids) - 1))
        for _ in range(
            guess.randint(0, 6) if base else 0
        ):  # side rows, most of them right where their parent is
            parent = guess.randrange(base - 1, base + len(parents))
            if parent == base + len(parents) - 1 == base + len(ids) - 1:
                continue
            position = positions_of(base, parents)[parent - base] + 1 if parent >= base else base
            is_right = guess.random() < 0.7 and position < len(truth)
            ids_beside = truth[position] if is_right else guess.randrange(VOCAB)
            parents.append(parent)
            ids.append(ids_beside)
        return Draft(SESSION, 1, 0, base, tuple(parents), tuple(ids))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2)], ids=["1 stage", "2 stages", "3 stages"])
def test_tokens_are_those_without_drafts_and_dead_rows_are_never_read(
    bundle: Bundle, sampling: str, boundaries: tuple[int, ...]
) -> None:
    rng = random.Random(sampling)
    prompt = [rng.randrange(VOCAB) for _ in range(21)]
    order = OpenSession(SESSION, 1, 21, 21, 90, (), SAMPLINGS[sampling], "sampler")
    plain = Line(bundle, boundaries)
    plain.generate(order, prompt, None, [])
    assert len(plain.tokens) == 90 - 21
    assert plain.tokens[-1].finish == "length"
    truth = [*prompt, *(token.id for token in plain.tokens)]
    poisoned = 0
    for seed in range(4):
        drafted = Line(bundle, boundaries)
        drafted.generate(order, prompt, random.Random(seed), truth)
        assert drafted.tokens == plain.tokens
        assert all(not device.queue for device in drafted.devices.values())
        assert all(not device.stage.kv_used_tokens for device in drafted.devices.values())
        poisoned += sum(device.rows_poisoned for device in drafted.devices.values())
    assert poisoned > 0


def test_an_end_id_inside_an_accepted_draft_ends_the_request_there(bundle: Bundle) -> None:
    prompt = list(range(21))
    order = OpenSession(SESSION, 1, 21, 21, 90, (), SAMPLINGS["sampled"], "sampler")
    plain = Line(bundle, (1,))
    plain.generate(order, prompt, None, [])
    end = next(i for i in range(12, 60) if plain.tokens[i].id not in {t.id for t in plain.tokens[:i]})
    truth = [*prompt, *(token.id for token in plain.tokens)]
    expected = [*plain.tokens[:end], replace(plain.tokens[end], finish="stop")]
    for seed in range(6):
        drafted = Line(bundle, (1,))
        stop_ids = (plain.tokens[end].id,)
        drafted.generate(replace(order, stop_ids=stop_ids), prompt, random.Random(seed), truth)
        assert drafted.tokens == expected


def test_right_drafts_run_every_row_once_and_few_steps(bundle: Bundle) -> None:
    """The point of it all: many tokens of a single turn, and no row for nothing."""
    prompt = list(range(21))
    order = OpenSession(SESSION, 1, 21, 21, 60, (), SAMPLINGS["sampled"], "sampler")
    plain = Line(bundle, (1,))
    plain.generate(order, prompt, None, [])
    truth = [*prompt, *(token.id for token in plain.tokens)]
    drafted = Line(bundle, (1,))
    drafted.tell(order)
    drafted.tell(Feed(SESSION, 1, 0, tuple(prompt)))
    verdicts = 0
    while len(drafted.tokens) < 39:
        before = len(drafted.tokens)
        while drafted.line:
            drafted.pass_on()
        for device in drafted.devices.values():
            device.step()
        if before == 0 and drafted.line:
            drafted.tell(Draft(SESSION, 1, 0, 21, tuple(range(20, 58)), tuple(truth[21:59])))
        verdicts += len(drafted.tokens) > before
    assert drafted.tokens == plain.tokens
    assert verdicts <= 4
    assert all(device.rows_run == 59 for device in drafted.devices.values())
