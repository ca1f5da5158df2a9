"""Real processes: drafts change no id, greedy or sampled, whatever stage is killed in the middle of a stream."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime import DeviceSpec, LocalCluster
from edge_runtime.sdk import draft_stream
from edge_runtime.speculative.controller import Choice, Controller
from edge_runtime.speculative.draft_loop import DraftLoop
from edge_runtime.speculative.estimates import Measured
from tests.support.copied_code import COPIED_CODE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

PROMPT = COPIED_CODE
NOVEL = "import os\n\n\ndef read_lines(path):\n"
OPTIONS = {"max_tokens": 160, "ignore_eos": True}
GREEDY = {"temperature": 0.0, **OPTIONS}
SAMPLED = {"temperature": 0.7, "seed": 7, **OPTIONS}
WARM = {**SAMPLED, "temperature": 1.0}
CHOICES = pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def three(demo_bundle: Path) -> Iterator[LocalCluster]:
    """Three stages, and a fourth device that is paired and stands by."""
    devices = [DeviceSpec(name=name) for name in ("a", "b", "c", "spare")]
    with LocalCluster(demo_bundle, devices=devices, split=[(0, 1), (2, 3), (4, 5)]) as cluster:
        yield cluster


@CHOICES
def test_drafts_change_no_id_and_some_are_right(three: LocalCluster, options) -> None:
    plain = three.client().generate(PROMPT, **options)
    with three.client(draft="suffix") as client:
        drafted = client.generate(PROMPT, **options)
        again = client.generate(PROMPT, **options)  # from what the first one said
    assert drafted.token_ids == plain.token_ids == again.token_ids
    assert drafted.text == plain.text
    assert drafted.finish_reason == plain.finish_reason == "length"
    assert drafted.accepted_draft_tokens > 0
    assert again.accepted_draft_tokens > 0


class AlwaysWide(Controller):
    """Drafts whether it pays or not: next to a target on the same machine it hardly ever does."""

    def choose(self, measured: Measured, committed_ids: int, load: float = 0.0) -> Choice:
        return Choice(window=8, chunk=2, width=3)


def test_side_rows_change_no_id_and_save_misses(three: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses beside the drafts of the model that ships, wherever it names any."""
    loops: list[DraftLoop] = []

    def loop_of(*given: object, **named: object) -> DraftLoop:
        loops.append(DraftLoop(*given, **named))
        return loops[-1]

    monkeypatch.setattr(draft_stream, "Controller", AlwaysWide)
    monkeypatch.setattr(draft_stream, "DraftLoop", loop_of)
    for options in (GREEDY, SAMPLED, WARM, {**WARM, "seed": 8}):
        plain = three.client().generate(NOVEL, **options)
        with three.client(draft="model") as client:
            drafted = client.generate(NOVEL, **options)
        assert drafted.token_ids == plain.token_ids
    assert sum(loop.counts.sides for loop in loops) > 0
    assert sum(loop.counts.rescued for loop in loops) > 0


@CHOICES
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_killed_while_drafts_are_in_flight_leaves_no_trace(
    three: LocalCluster, options, stage: int
) -> None:
    undisturbed = three.client().generate(PROMPT, **options).token_ids
    before = three.status()["plan"]
    victim = before["stages"][stage][0]
    ids: list[int] = []
    with three.client(draft="suffix") as client, client.stream(PROMPT, **options) as stream:
        for token in stream:
            ids.append(token.id)
            if len(ids) == 30:
                os.kill(three.pids[victim], signal.SIGKILL)
    assert tuple(ids) == undisturbed
    assert three.status()["plan"]["lease"] > before["lease"]
    assert stream.result.accepted_draft_tokens > 0
    three.restart(victim)
