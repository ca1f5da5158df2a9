"""Drafts over real processes: `python -m benchmarks.speculative_real [--json] [--rounds N] [--tokens N]`.

The demo target on two one-thread agents, 25 ms from each other in each direction, and a client that drafts with the
demo's small model and what the request repeats. The same requests without drafts pay the loop for every token. Code:
files that the models never saw, continued. Edit: such a file's lines, and again their beginning: to be copied.

Speed counts only on output without a period below 64 tokens: a small model that loops flatters every drafter. Times
are those of the caller. Rows are those of the tail's notes (`timed_agent.py`): more than one to a token is waste.

Knows: requests, their tokens and times. Does not know: how drafts are made or judged.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.checkpoints import CACHE
from benchmarks.clusters import Running, running
from benchmarks.models import TINY, Model
from benchmarks.shaping_proxy import Shape
from edge_runtime import AsyncClient, DeviceSpec
from edge_runtime.sdk.drafting import shipped_draft
from edge_runtime.speculative.wire import CommittedDecoder, CommittedFrame, DraftEncoder, DraftFrame

ONE_WAY_SECONDS = 0.025
MAX_PERIOD_TOKENS = 63
REPEATED_TOKENS = 24  # of a period that must have come twice over so many tokens to count as a loop
TEMPERATURES = (0.0, 0.7)
PROMPT_CHARACTERS = {"code": 600, "edit": 1600}
AGAIN_CHARACTERS = 60  # of the edited file that are given: the rest is the model's
EXAMPLES = Path(__file__).parents[1] / "examples" / "models"


@dataclass(frozen=True)
class DemoModel(Model):
    """The target that ships."""

    def bundle(self) -> Path:
        return Path(__file__).parents[1] / "edge_runtime" / "demo" / "bundle"


DEMO = DemoModel(**{name: getattr(TINY, name) for name in Model.__dataclass_fields__})


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds, of the caller's clock

    @property
    def tokens_per_second(self) -> float | None:
        """Over the tokens that continue no loop; None where there are none."""
        counted = [i for i in range(1, len(self.ids)) if not loops(self.ids[: i + 1])]
        seconds = sum(self.times[i] - self.times[i - 1] for i in counted)
        return len(counted) / seconds if seconds else None


def loops(ids: Sequence[int]) -> bool:
    """Whether the end of `ids` repeats itself with a period below 64 tokens."""
    for period in range(1, MAX_PERIOD_TOKENS + 1):
        length = max(period, REPEATED_TOKENS)
        if len(ids) >= length + period and list(ids[-length:]) == list(ids[-length - period : -period]):
            return True
    return False


class LinkBytes:
    """Payload bytes of the drafting link in both directions, counted where frames are written and read."""

    def __init__(self) -> None:
        self.up = self.down = 0

    def watch(self) -> None:
        encode, decode = DraftEncoder.encode, CommittedDecoder.decode

        def encoded(encoder: DraftEncoder, frame: DraftFrame) -> bytes:
            data = encode(encoder, frame)
            self.up += len(data)
            return data

        def decoded(decoder: CommittedDecoder, data: bytes) -> CommittedFrame:
            self.down += len(data)
            return decode(decoder, data)

        DraftEncoder.encode, CommittedDecoder.decode = encoded, decoded  # type: ignore[method-assign, assignment]


def prompts(count: int) -> dict[str, list[str]]:
    """Of held-out files, evenly spaced."""
    sys.path.insert(0, str(EXAMPLES))
    from text import standard_library  # type: ignore[import-not-found]

    held_out = [file.text for file in standard_library() if file.is_held_out and len(file.text) > 6000]
    chosen = held_out[:: max(1, len(held_out) // count)][:count]
    code = [text[2000 : 2000 + PROMPT_CHARACTERS["code"]] for text in chosen]
    spans = [text[2000 : 2000 + PROMPT_CHARACTERS["edit"]] for text in chosen]
    return {"code": code, "edit": [f"{span}\n\n{span[:AGAIN_CHARACTERS]}" for span in spans]}


async def answer(client: AsyncClient, prompt: str, tokens: int, temperature: float) -> Answer:
    found = Answer()
    options: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": temperature,
        "seed": 7,
        "ignore_eos": True,
    }
    async with client.stream(prompt, **options) as stream:
        async for token in stream:
            found.ids.append(token.id)
            found.times.append(time.monotonic())
    return found


async def measure(*, count: int, tokens: int, draft: Path) -> dict[str, Any]:
    """Every request without drafts, then with them. See the module's text for what is returned."""
    link = LinkBytes()
    link.watch()
    devices = [DeviceSpec(name, memory="768MiB", threads=1) for name in ("near", "far")]
    speeds: dict[str, list[float]] = {"code": [], "edit": []}
    plain_speeds: dict[str, list[float]] = {"code": [], "edit": []}
    differing = compared = 0
    times: list[tuple[float, float]] = []  # of the first and the last token with drafts
    shape = Shape(delay_seconds=ONE_WAY_SECONDS)
    async with (
        running(DEMO, devices, split=((0, 2), (3, 5)), shape=shape) as cluster,
        cluster.drafting_client(draft) as drafting,
    ):
        for workload, texts in prompts(count).items():
            for temperature in TEMPERATURES:
                for text in texts:
                    plain = await answer(cluster.client, text, tokens, temperature)
                    drafted = await answer(drafting, text, tokens, temperature)
                    times.append((drafted.times[0], drafted.times[-1]))
                    compared += len(plain.ids)
                    differing += sum(a != b for a, b in zip(plain.ids, drafted.ids, strict=False))
                    differing += abs(len(plain.ids) - len(drafted.ids))
                    one, other = plain.tokens_per_second, drafted.tokens_per_second
                    report.say(f"{workload} T={temperature}: {one} -> {other} tokens/s")
                    if one is not None and other is not None:
                        plain_speeds[workload].append(one)
                        speeds[workload].append(other)
    rows = rows_run(cluster, times)
    speedups = {name: _ratio(speeds[name], plain_speeds[name]) for name in speeds}
    return {
        "real_speedup_code": speedups["code"],
        "real_speedup_edit": speedups["edit"],
        "bytes_up_per_token": link.up / compared,
        "bytes_down_per_token": link.down / compared,
        "wasted_rows_fraction": 1 - (compared - len(times)) / rows if rows else None,
        "identical_tokens": compared - differing,
        "differing_tokens": differing,
    }


def rows_run(cluster: Running, times: Sequence[tuple[float, float]]) -> int:
    """Rows of the tail within these times: none of them is a prompt's."""
    steps = cluster.steps.get("far", [])
    return sum(step.rows for step in steps for begin, end in times if begin <= step.begin <= end)


def _ratio(new: Sequence[float], old: Sequence[float]) -> float | None:
    return statistics.harmonic_mean(new) / statistics.harmonic_mean(old) if new and old else None


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument(
        "--draft", type=Path, default=None, help="a draft model's bundle; else the one that ships"
    )
    flags = parser.parse_args()
    draft = flags.draft or (shipped_draft() if shipped_draft().is_dir() else CACHE / "demo-draft")
    count = flags.rounds or 4
    settings = {"tokens": flags.tokens, "requests": 2 * len(TEMPERATURES) * count, "loop_ms": 50}
    ours = report.Report("Drafts over real processes", only_json=flags.json, **settings)
    ours.end(asyncio.run(measure(count=count, tokens=flags.tokens, draft=draft)))


if __name__ == "__main__":
    main()
