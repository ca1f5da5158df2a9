"""The console's drafting modules in a real JavaScript engine: frames, guesses and decisions are those of Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page

from edge_runtime.core import SamplingParams
from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory
from edge_runtime.speculative.wire import (
    CommittedDecoder,
    CommittedEncoder,
    CommittedFrame,
    DraftDecoder,
    DraftEncoder,
    chain_frame,
)
from tests.support import chromium

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

DECISIONS = json.loads(Path(__file__).with_name("draft_loop_golden.json").read_text())
VECTORS = json.loads((Path(__file__).parents[1] / "speculative" / "wire_golden.json").read_text())
VOCABULARIES = (4096, 1 << 16, (1 << 16) + 1, 1 << 17)
MAX_ROWS = 1 << 30
SCRIPTS, STEPS = 24, 120
LEAST_MEMORY_BYTES, LEAST_INDEX_BYTES = 4096, 64 << 10


async def run(page: Page, module: str, body: str, given: Any) -> Any:
    """As `chromium.run`, with a module of the page as `m`."""
    return await chromium.run(page, f'const m = await import("/console/drafting/{module}");\n{body}', given)


# ---------------------------------------------------------------- frames

ENCODE = """return given.map(([vocabSize, frames]) => {
  const encoder = new m.DraftEncoder(vocabSize);
  return frames.map(([turn, baseRow, ids]) => [...encoder.encode({ turn, baseRow, ids })]);
});"""
DECODE = """return given.map(([vocabSize, all]) => {
  const decoder = new m.CommittedDecoder(vocabSize);
  return all.map((data) => {
    try {
      const { position, ids, finish, load } = decoder.decode(Uint8Array.from(data));
      return [position, ids, finish, load];
    } catch (error) {
      if (error instanceof m.FrameError) return "refused";
      throw error;
    }
  });
});"""


async def test_golden_frames_are_what_the_page_makes_and_reads(modules: Page) -> None:
    drafts = [[v["vocabulary"], [frame[:3] for frame in v["drafts"]]] for v in VECTORS]
    expected = [[list(bytes.fromhex(frame[3])) for frame in v["drafts"]] for v in VECTORS]
    assert await run(modules, "wire.js", ENCODE, drafts) == expected
    committed = [[v["vocabulary"], [list(bytes.fromhex(f[3])) for f in v["committed"]]] for v in VECTORS]
    assert await run(modules, "wire.js", DECODE, committed) == [
        [[*frame[:3], None] for frame in v["committed"]] for v in VECTORS
    ]


async def test_random_drafts_are_the_bytes_of_python_and_come_out_as_they_went_in(modules: Page) -> None:
    rng = random.Random(1)
    given: list[tuple[int, list[tuple[int, int, list[int]]]]] = []
    for _ in range(100):
        vocabulary, turn, base, frames = rng.choice(VOCABULARIES), 0, 1, []
        for _ in range(rng.randint(1, 12)):
            turn += rng.choice((0, 0, 0, 1, 200, 70_000))
            base = max(base if rng.random() < 0.7 else rng.randrange(1 << 20), turn, 1)
            ids = [rng.randrange(vocabulary) for _ in range(rng.choice((1, 2, 63, 64, 65, 200)))]
            frames.append((turn, base, ids))
            base += len(ids)
        given.append((vocabulary, frames))
    found = await run(modules, "wire.js", ENCODE, given)
    for (vocabulary, frames), encoded in zip(given, found, strict=True):
        encoder, decoder = DraftEncoder(vocabulary), DraftDecoder(vocabulary, MAX_ROWS)
        for (turn, base, ids), data in zip(frames, encoded, strict=True):
            frame = chain_frame(turn, base, tuple(ids))
            assert bytes(data) == encoder.encode(frame)
            assert decoder.decode(bytes(data)) == frame


async def test_a_turn_that_sinks_is_no_frame(modules: Page) -> None:
    body = """const encoder = new m.DraftEncoder(300);
    encoder.encode({ turn: 5, baseRow: 6, ids: [1] });
    return given.map((frame) => {
      try { return encoder.encode(frame); } catch (error) { return error.constructor.name; }
    });"""
    frames = [
        {"turn": 4, "baseRow": 7, "ids": [1]},
        {"turn": 9, "baseRow": 8, "ids": [1]},
        {"turn": 5, "baseRow": 7, "ids": []},
    ]
    assert await run(modules, "wire.js", body, frames) == ["FrameError"] * 3


async def test_committed_ids_are_read_as_python_reads_them_and_damage_is_refused(modules: Page) -> None:
    """Truncated and flipped bytes between sound frames: both ends refuse the same ones and keep their state."""
    rng = random.Random(2)
    given, expected = [], []
    for _ in range(100):
        vocabulary, position = rng.choice(VOCABULARIES), rng.randrange(1 << 20)
        encoder, decoder, sent, read = CommittedEncoder(vocabulary), CommittedDecoder(vocabulary), [], []
        for _ in range(rng.randint(1, 12)):
            position = position if rng.random() < 0.7 else rng.randrange(1 << 31)
            ids = tuple(rng.randrange(vocabulary) for _ in range(rng.choice((0, 1, 2, 30, 31, 32, 300))))
            data = encoder.encode(CommittedFrame(position, ids, rng.choice(("", "", "stop", "length"))))
            position += len(ids)
            load = encoder.encode(CommittedFrame(0, (), load=rng.random()))
            for variant in (damaged(data, rng), data, load):
                sent.append(list(variant))
                read.append(decoded(decoder, variant))
        given.append((vocabulary, sent))
        expected.append(read)
    assert await run(modules, "wire.js", DECODE, given) == expected


def damaged(data: bytes, rng: random.Random) -> bytes:
    cut = data[: rng.randrange(len(data))]
    return cut if rng.random() < 0.5 else cut + bytes(rng.randrange(256) for _ in range(rng.randint(0, 6)))


def decoded(decoder: CommittedDecoder, data: bytes) -> list[Any] | str:
    """A damaged frame that reads well moves the state on; the next sound one says its position or is off by as much."""
    try:
        frame = decoder.decode(data)
    except ProtocolError:
        return "refused"
    return [frame.position, list(frame.ids), frame.finish, frame.load]


# ---------------------------------------------------------------- the drafter

DRAFT = """const { SuffixMemory } = await import("/console/drafting/suffix_memory.js");
return given.map(({ memoryBytes, steps }) => {
  const memory = new SuffixMemory(memoryBytes);
  const drafter = new m.SuffixDrafter(memory, 65536);
  return steps.map(([name, ...values]) => {
    const guess = drafter[name](...values);
    return guess ? guess.ids : [memory.memoryBytes, drafter.tree.memoryBytes];
  });
});"""


def script(rng: random.Random) -> dict[str, Any]:
    """Requests in a small alphabet, so that much repeats; now and then a loop, now and then a wide one."""
    symbols = rng.choice((2, 4, 30, 1000))
    period = [rng.randrange(symbols) for _ in range(rng.randint(1, 9))]

    def ids(count: int) -> list[int]:
        looped = rng.random() < 0.5
        return [period[i % len(period)] if looped else rng.randrange(symbols) for i in range(count)]

    steps: list[list[Any]] = []
    while len(steps) < STEPS:
        length = rng.randint(1, 200)
        steps.append(["begin", ids(length)])
        for _ in range(rng.randint(1, 40)):
            kind = rng.choice(("extend", "extend", "propose", "propose", "propose", "rewind"))
            if kind == "extend":
                more = ids(rng.choice((1, 3, 40, 3000 if symbols == 1000 else 60)))
                length += len(more)
                steps.append(["extend", more])
            elif kind == "propose":
                steps.append(["propose", rng.choice((1, 4, 16, 64))])
            else:
                length = max(1, length - rng.choice((1, 2, 30)))
                steps.append(["rewind", length])
        steps.append(["end", rng.random() < 0.8])
    return {"memoryBytes": rng.choice((LEAST_MEMORY_BYTES, 4 << 20)), "steps": steps}


def drafted_in_python(memory_bytes: int, steps: list[list[Any]]) -> list[list[int]]:
    memory = SuffixMemory(memory_bytes)
    drafter = SuffixDrafter(memory, request_index_bytes=LEAST_INDEX_BYTES)
    results: list[list[int]] = []
    for name, *values in steps:
        if name == "propose":
            results.append(list(drafter.propose(*values).ids))
            continue
        if name == "end":
            drafter.end(learn=values[0])
        elif name == "begin":
            drafter.begin(values[0], SamplingParams())
        else:
            getattr(drafter, name)(values[0])
        results.append([memory.memory_bytes, drafter._tree.memory_bytes])
    return results


async def test_the_page_guesses_what_the_suffix_drafter_guesses_and_forgets_what_it_forgets(
    modules: Page,
) -> None:
    rng = random.Random(3)
    scripts = [script(rng) for _ in range(SCRIPTS)]
    expected = [drafted_in_python(each["memoryBytes"], each["steps"]) for each in scripts]
    found = await run(modules, "suffix_drafter.js", DRAFT, scripts)
    guesses = 0
    for each, ours, theirs in zip(scripts, expected, found, strict=True):
        for step, python, javascript in zip(each["steps"], ours, theirs, strict=True):
            assert javascript == python, step[0]
            guesses += step[0] == "propose" and bool(python)
    assert guesses > 500


async def test_a_memory_that_was_cleared_knows_nothing(modules: Page) -> None:
    body = """const { Memories } = await import("/console/drafting/memories.js");
    const memories = new Memories();
    const guess = (digest) => {
      const drafter = new m.SuffixDrafter(memories.of(digest));
      drafter.begin([1, 2, 3]);
      const { ids } = drafter.propose(4);
      drafter.extend([4, 5, 6]);
      drafter.end(true);
      return ids;
    };
    guess("a");
    const drafter = new m.SuffixDrafter(memories.of("a"));
    drafter.begin([9, 4]);
    const before = [drafter.propose(4).ids, memories.rememberedIds];
    const other = new m.SuffixDrafter(memories.of("b"));
    other.begin([9, 4]);
    memories.clear();
    return [...before, other.propose(4).ids, drafter.propose(4).ids, memories.rememberedIds];"""
    assert await run(modules, "suffix_drafter.js", body, None) == [[5], 4, [], [], 0]


# ---------------------------------------------------------------- decisions

DECIDE = """const { Estimates } = await import("/console/drafting/estimates.js");
const plain = ({ do: name, ...rest }) => [name, ...Object.values(rest)];
return given.cases.map(({ window, chunk, maxRows, loopSeconds, isLoopMeasured, events }) => {
  const choosePace = () => ({ window, chunk }), estimates = new Estimates();
  Object.defineProperty(estimates, "slowLoopSeconds", { value: loopSeconds });
  Object.defineProperty(estimates, "isLoopMeasured", { value: isLoopMeasured });
  const loop = new m.DraftLoop({ ...given.head, maxRows, choosePace, estimates });
  return events.map(([name, values, now]) => {
    const [first, second, finish] = values;
    const actions = loop[name](...(name === "committed" ? [first, second, now, finish] : [...values, now])).map(plain);
    const { drafted, accepted, wasted, misses, resentFrames } = loop.counts;
    return [actions, [loop.length, loop.turn, drafted, accepted, wasted, misses, resentFrames, loop.wakeAt]];
  });
});"""


async def test_the_page_decides_what_the_draft_loop_decided(modules: Page) -> None:
    found = await run(modules, "draft_loop.js", DECIDE, DECISIONS)
    sent = resent = 0
    for case, results in zip(DECISIONS["cases"], found, strict=True):
        for event, result in zip(case["events"], results, strict=True):
            assert result == event[3:], event[:3]
            sent += sum(action[0] == "send" for action in event[3])
        resent += case["events"][-1][4][6]
    assert sent > 300
    assert resent > 30


async def test_the_window_follows_acceptance_and_the_targets_load(modules: Page) -> None:
    body = "return given.map(([acceptance, load]) => m.choosePace({ acceptance, load }).window);"
    pairs = [(0.0, 0), (0.7, 0), (1.0, 0), (0.7, 0.5), (0.95, 1), (0.7, 1)]
    rare, even, often, half, loaded, nothing = await run(modules, "pace.js", body, pairs)
    assert (rare, often) == (0, 64)
    assert 4 < even < 12
    assert half == 2  # 0.7² is above 0.44
    assert loaded == 2  # 0.95² is above 0.88
    assert nothing == 0


HOLD = """const { Estimates } = await import("/console/drafting/estimates.js");
let window = 0;
const choosePace = () => ({ window, chunk: 4 });
const estimates = new Estimates(), head = { promptLength: 3, maxRows: 90, vocabSize: 50, stopIds: [] };
const loop = new m.DraftLoop({ ...head, choosePace, estimates });
const judged = [], said = [];
estimates.judged = (right) => judged.push(right);
const take = (actions) => said.push(actions.map((action) => action.do));
take(loop.start(0));
take(loop.committed(3, [7], 1));
take(loop.proposed(1, [8], 1));
take(loop.committed(4, [8], 2));
take(loop.proposed(2, [9], 2));
take(loop.committed(5, [10, 11], 3));
window = 4;
take(loop.proposed(3, [12], 3));
take(loop.committed(7, [12], 4));
return [said, judged, loop.counts];"""


async def test_drafts_that_are_not_worth_sending_are_judged_all_the_same(modules: Page) -> None:
    said, judged, counts = await run(modules, "draft_loop.js", HOLD, None)
    assert said[:6] == [[], ["extend", "propose"], [], ["extend", "propose"], [], ["extend", "propose"]]
    assert said[6][:2] == ["send", "extend"]  # it is worth it again
    assert judged == [True, False, True]
    assert (counts["drafted"], counts["accepted"], counts["misses"]) == (1, 1, 0)
