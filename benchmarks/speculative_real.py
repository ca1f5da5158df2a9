"""Drafts over real processes: `python -m benchmarks.speculative_real [--json] [--rounds N] [--tokens N]`.

The demo target on two one-thread agents, 25 ms from each other in each direction, and a client that drafts with the
demo's small model and what the request repeats. Each request is made three times, in turns: without drafts, so that
every id goes round the loop; drafting in turns (`synchronous_drafts.py`), with the same drafters over the same link;
and as the product drafts. `known`: an answer that this user's device has seen before, which shows how fast the system
is when every draft is right.

Requests are those of `draft_requests.py`. Speed counts only on output without a period below 64 tokens. Times are those
of the caller; the first token's is not part of a speed. Rows are those of the agents' notes (`row_notes.py`).

Knows: requests, their tokens and times. Does not know: how drafts are made or judged.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks import link_bytes, report, synchronous_drafts
from benchmarks.clusters import Running, running
from benchmarks.demo_pair import TARGET, draft_bundle
from benchmarks.draft_requests import WORKLOADS, Asked, loops, requests
from benchmarks.link_bytes import LinkBytes
from benchmarks.models import TINY, Model
from benchmarks.row_notes import RowCounts, Window, count_rows, sampled_at
from benchmarks.shaping_proxy import Shape
from edge_runtime import AsyncClient, DeviceSpec
from edge_runtime.bundle.bundle import Bundle

ONE_WAY_SECONDS = 0.025
TEMPERATURES = (0.0, 0.7)
LOOP, IN_TURNS, PRODUCT, KNOWN = "loop", "in turns", "product", "known"
ARMS = (LOOP, IN_TURNS, PRODUCT)
KNOWN_TIMES = 2  # the first one learns
QUIET_SECONDS = 0.1  # after an answer, until rows that nobody wants any more have run
SEED = 7
ROUNDS = 6  # requests of each workload and temperature: which functions they ask for decides much
NEAR, FAR = "near", "far"


@dataclass(frozen=True)
class DemoModel(Model):
    """The target that ships."""

    def bundle(self) -> Path:
        return TARGET


DEMO = DemoModel(**{name: getattr(TINY, name) for name in Model.__dataclass_fields__})


@dataclass
class Answer:
    began: float
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds, of the caller's clock
    accepted: int = 0
    rejected: int = 0

    @property
    def window(self) -> Window:
        """In which rows ran for it."""
        return self.began, self.times[-1] + QUIET_SECONDS

    def tokens_per_second(self) -> float | None:
        """Over the tokens that continue no loop; None where there are none."""
        counted = [i for i in range(1, len(self.ids)) if not loops(self.ids[: i + 1])]
        seconds = sum(self.times[i] - self.times[i - 1] for i in counted)
        return len(counted) / seconds if seconds else None


@dataclass
class Measured:
    """Answers by (workload, arm), in the order of the requests; bytes of the product's arm; rows that it ran."""

    answers: dict[tuple[str, str], list[Answer]] = field(default_factory=dict)
    link: LinkBytes = field(default_factory=LinkBytes)
    rows: dict[str, RowCounts] = field(default_factory=dict)

    def of(self, arm: str) -> list[Answer]:
        return [one for workload in WORKLOADS for one in self.answers.get((workload, arm), ())]

    def speedup(self, workload: str, arm: str, base: str = LOOP) -> float | None:
        """Harmonic mean of speeds over that of `base`, over requests that count in both."""
        pairs = [
            (one.tokens_per_second(), other.tokens_per_second())
            for one, other in zip(
                self.answers.get((workload, arm), ()), self.answers.get((workload, base), ()), strict=False
            )
        ]
        both = [(new, old) for new, old in pairs if new is not None and old is not None]
        if not both:
            return None
        new, old = zip(*both, strict=True)
        return float(statistics.harmonic_mean(new) / statistics.harmonic_mean(old))

    def differing(self) -> tuple[int, int]:
        """(compared ids, those that are not the plain loop's), missing ones, too."""
        compared = differing = 0
        for (workload, arm), found in self.answers.items():
            if arm == LOOP:
                continue
            for one, plain in zip(found, self.answers[workload, LOOP], strict=False):
                compared += len(plain.ids)
                differing += sum(a != b for a, b in zip(one.ids, plain.ids, strict=False))
                differing += abs(len(one.ids) - len(plain.ids))
        return compared, differing


async def answer(client: AsyncClient, asked: Asked) -> Answer:
    found = Answer(time.monotonic())
    options: dict[str, Any] = {
        "max_tokens": asked.most_tokens,
        "temperature": asked.temperature,
        "seed": SEED,
        "ignore_eos": True,
    }
    async with client.stream(asked.prompt, **options) as stream:
        async for token in stream:
            found.ids.append(token.id)
            found.times.append(time.monotonic())
    found.accepted = stream.result.accepted_draft_tokens
    found.rejected = stream.result.rejected_draft_tokens
    await asyncio.sleep(QUIET_SECONDS)
    return found


async def measure(*, asked: Sequence[Asked], draft: str | Path, known: int) -> Measured:
    """Every request in every arm, in an order that turns round; the first `known` code requests as known, too."""
    found = Measured()
    devices = [DeviceSpec(name, memory="768MiB", threads=1) for name in (NEAR, FAR)]
    shape = Shape(delay_seconds=ONE_WAY_SECONDS)
    async with running(DEMO, devices, split=((0, 2), (3, 5)), shape=shape) as cluster:
        async with AsyncExitStack() as stack:
            clients = {LOOP: cluster.client}
            for arm in (IN_TURNS, PRODUCT):
                clients[arm] = await stack.enter_async_context(cluster.drafting_client(draft))
            await _warm_up(clients, asked[0])
            for index, one in enumerate(asked):
                for arm in ARMS if index % 2 == 0 else ARMS[::-1]:
                    await _one(found, arm, clients[arm], one)
                report.say(_said(found, one))
        for one in [each for each in asked if each.workload == "code"][:known]:
            await _known(found, cluster, one)
    _count_rows(found, cluster)
    return found


async def _warm_up(clients: dict[str, AsyncClient], asked: Asked) -> None:
    """The draft model is read, the tokenizer is here, and both ends have measured their link."""
    for arm in ARMS:
        with synchronous_drafts.in_turns() if arm == IN_TURNS else nullcontext():
            await answer(clients[arm], Asked(asked.workload, "import os\n\n\ndef main(", 0.7, 24))


async def _one(found: Measured, arm: str, client: AsyncClient, asked: Asked) -> None:
    if arm == PRODUCT:
        with link_bytes.counted(found.link):
            done = await answer(client, asked)
    else:
        with synchronous_drafts.in_turns() if arm == IN_TURNS else nullcontext():
            done = await answer(client, asked)
    found.answers.setdefault((asked.workload, arm), []).append(done)


async def _known(found: Measured, cluster: Running, asked: Asked) -> None:
    async with cluster.drafting_client("suffix") as client:
        answers = [await answer(client, asked) for _ in range(KNOWN_TIMES)]
    found.answers.setdefault((asked.workload, KNOWN), []).append(answers[-1])
    report.say(f"{asked.workload} T={asked.temperature}, known: {_rate(answers[-1])}")


def _count_rows(found: Measured, cluster: Running) -> None:
    """Once the cluster has ended and its notes are read. Stage 1 hears of a miss a one-way delay later."""
    known = sampled_at(cluster.rows.get(FAR, []))
    windows = [one.window for one in found.of(PRODUCT)]
    for name, delay in ((NEAR, ONE_WAY_SECONDS), (FAR, 0.0)):
        found.rows[name] = count_rows(cluster.rows.get(name, []), known, delay, windows)


def figures(found: Measured) -> dict[str, Any]:
    """Under the names of the JSON. Bytes and rows are those of the product's arm, in the run of its speeds."""
    ours = found.of(PRODUCT)
    tokens = sum(len(one.ids) for one in ours)
    needed_rows = len(found.rows) * (tokens - len(ours))  # the last id of an answer is never run
    run = sum(rows.run for rows in found.rows.values())
    compared, differing = found.differing()
    judged = sum(one.accepted + one.rejected for one in ours)
    return {
        "real_speedup_code": found.speedup("code", PRODUCT),
        "real_speedup_edit": found.speedup("edit", PRODUCT),
        "real_in_turns_speedup_code": found.speedup("code", IN_TURNS),
        "real_in_turns_speedup_edit": found.speedup("edit", IN_TURNS),
        "real_speedup_known": found.speedup("code", KNOWN),
        "real_acceptance_code": _accepted_share(found.answers["code", PRODUCT]),
        "real_acceptance_edit": _accepted_share(found.answers["edit", PRODUCT]),
        "drafted_share_wasted": 1 - sum(one.accepted for one in ours) / judged if judged else None,
        "bytes_up_per_token": found.link.up / tokens,
        "bytes_down_per_token": found.link.down / tokens,
        "socket_bytes_up_per_token": found.link.socket_up / tokens or None,
        "socket_bytes_down_per_token": found.link.socket_down / tokens or None,
        "ids_per_draft_frame": found.link.up_ids / max(1, found.link.up_frames),
        "wasted_rows_fraction": 1 - needed_rows / run if run else None,
        "real_late_rows_fraction": sum(rows.late for rows in found.rows.values()) / run if run else None,
        "identical_tokens": compared - differing,
        "differing_tokens": differing,
    }


def _accepted_share(answers: Sequence[Answer]) -> float:
    """Of the committed ids, those that had been drafted."""
    return sum(one.accepted for one in answers) / sum(len(one.ids) for one in answers)


def _said(found: Measured, asked: Asked) -> str:
    rates = [f"{arm} {_rate(found.answers[asked.workload, arm][-1])}" for arm in ARMS]
    return f"{asked.workload} T={asked.temperature}, {asked.most_tokens} ids: {', '.join(rates)} tokens/s"


def _rate(one: Answer) -> str:
    rate = one.tokens_per_second()
    return (
        "loops" if rate is None else f"{rate:.1f} ({one.accepted} drafted)" if one.accepted else f"{rate:.1f}"
    )


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer, at most")
    parser.add_argument("--known", type=int, default=2, metavar="N", help="requests to repeat as known")
    parser.add_argument(
        "--draft", type=Path, default=None, help="a draft model's bundle; else the one that ships"
    )
    flags = parser.parse_args()
    draft = flags.draft or draft_bundle()
    tokenizer = Tokenizer.from_buffer(Bundle.open(DEMO.bundle()).tokenizer_json())
    asked = requests(tokenizer, flags.rounds or ROUNDS, TEMPERATURES, flags.tokens)
    settings = {"tokens": flags.tokens, "requests": len(asked), "loop_ms": 2000 * ONE_WAY_SECONDS}
    ours = report.Report("Drafts over real processes", only_json=flags.json, draft=draft.name, **settings)
    ours.end(figures(asyncio.run(measure(asked=asked, draft=draft, known=flags.known))))


if __name__ == "__main__":
    main()
