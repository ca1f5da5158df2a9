"""The decisions that the page's loop is held to are those of DraftLoop today."""

from __future__ import annotations

import json

from tests.browser.record_draft_loop import CASES, EVENTS, PATH, Recorder


def test_the_recording_is_what_the_draft_loop_does() -> None:
    """Where it is not: record anew, and mend the console's draft_loop.js until its test passes."""
    recorded = json.loads(PATH.read_text())["cases"]
    assert len(recorded) == CASES
    for case, before in enumerate(recorded):
        recorder = Recorder(case)
        for _ in range(EVENTS):
            recorder.step()
        assert json.loads(json.dumps(recorder.events)) == before["events"]
