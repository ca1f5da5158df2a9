"""What the benchmark of drafts asks for and counts, on literal cases and on the real held-out text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.draft_requests import loops, renamed, requests
from benchmarks.row_notes import Noted, RowCounts, Work, count_rows, read_notes, sampled_at
from benchmarks.speculative_real import KNOWN, LOOP, PRODUCT, Answer, Measured, figures
from benchmarks.timed_agent import row_note
from edge_runtime.agent.pipeline_events import Work as AgentWork
from edge_runtime.agent.pipeline_events import WorkFinished
from edge_runtime.bundle.bundle import Bundle
from edge_runtime.core import SessionId, Token

EVER = ((0.0, 100.0),)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    path = Path(__file__).parents[2] / "edge_runtime" / "demo" / "bundle"
    return Tokenizer.from_buffer(Bundle.open(path).tokenizer_json())


def test_requests_are_whole_functions_nobody_trained_on_each_asked_once(tokenizer: Tokenizer) -> None:
    asked = requests(tokenizer, 2, (0.0, 0.7), 100)
    assert [(each.workload, each.temperature) for each in asked] == [
        (workload, temperature) for workload in ("code", "edit") for temperature in (0.0, 0.7, 0.0, 0.7)
    ]
    assert len({each.prompt for each in asked}) == 8
    for each in asked:
        assert each.prompt.lstrip().startswith("def ")
        assert 40 <= each.most_tokens <= 100


def test_an_edit_shows_the_function_and_begins_it_again_with_one_name_changed(tokenizer: Tokenizer) -> None:
    for each in requests(tokenizer, 2, (0.0,), 1000)[2:]:
        function, _, begun = each.prompt.partition("\n\n\n")
        edited = renamed(function)
        assert edited.startswith(begun)
        assert function != edited
        assert edited.replace("new_", "") == function.replace("new_", "")
        assert each.most_tokens == len(tokenizer.encode(edited[len(begun) :]).ids)  # it ends with the copy


def test_the_most_used_name_is_changed_everywhere_and_parts_of_names_are_not() -> None:
    assert renamed("def f(value):\n    values = value, len(value)\n    self.x = value") == (
        "def f(new_value):\n    values = new_value, len(new_value)\n    self.x = new_value"
    )


def test_a_loop_is_a_period_that_came_twice() -> None:
    assert loops(list(range(30)) * 2)
    assert loops([5] * 25)
    assert not loops([5] * 24)
    assert not loops(list(range(64)) * 2)  # a period of 64 is text
    assert not loops(list(range(60)))


def noted(began: float, base_row: int, *ids: int, sides: tuple[tuple[int, int], ...] = ()) -> Noted:
    side_ids, parents = tuple(token for token, _ in sides), tuple(parent for _, parent in sides)
    return Noted(began, began + 0.5, (Work(1, base_row, False, ids, side_ids, parents),), ())


KNOWN_IDS = {(1, 10): (70, 1.0), (1, 11): (71, 2.0), (1, 12): (72, 3.0)}


def test_rows_after_an_id_known_to_be_another_are_late() -> None:
    right, wrong = noted(5.0, 10, 70, 71, 72), noted(5.0, 10, 70, 99, 72, 73)
    assert count_rows([right], KNOWN_IDS, 0.0, EVER) == RowCounts(3, 0)
    assert count_rows([wrong], KNOWN_IDS, 0.0, EVER) == RowCounts(4, 3)
    assert count_rows([wrong], KNOWN_IDS, 2.9, EVER) == RowCounts(4, 3)  # sampled at 2, here at 4.9
    assert count_rows([wrong], KNOWN_IDS, 3.1, EVER) == RowCounts(4, 0)
    assert count_rows([wrong], KNOWN_IDS, 0.0, [(6.0, 7.0)]) == RowCounts(0, 0)


def test_rows_that_follow_a_wrong_row_of_an_earlier_step_are_late_too_until_it_is_replaced() -> None:
    before, after, anew = noted(0.5, 10, 70, 99), noted(5.0, 12, 72), noted(6.0, 11, 71, 72)
    assert count_rows([before, after, anew], KNOWN_IDS, 0.0, EVER) == RowCounts(5, 1)


def test_a_side_row_is_late_by_its_own_path() -> None:
    """Chain 70 99; beside it 71 after 70, which is right, its child 72, and a child of the wrong 99."""
    sides = ((71, 10), (72, 12), (72, 11))
    assert count_rows([noted(5.0, 10, 70, 99, sides=sides)], KNOWN_IDS, 0.0, EVER) == RowCounts(5, 2)


def test_notes_of_an_agent_are_read_back_up_to_a_line_that_was_cut_off(tmp_path: Path) -> None:
    work = AgentWork(1, SessionId(4), 0, 1, 7, (5, 6), None, 2, False)
    line = row_note(1.0, 2.0, [work], [WorkFinished(work, None, (Token(8, 6), Token(9, 3)))])
    path = tmp_path / "rows"
    path.write_bytes(line + line[:20])
    (step,) = read_notes(path)
    assert step == Noted(1.0, 2.0, (Work(4, 7, False, (5, 6)),), ((4, 8, 6), (4, 9, 3)))
    assert sampled_at([step]) == {(4, 8): (6, 2.0), (4, 9): (3, 2.0)}
    assert json.loads(line)["began"] == 1.0


def answered(ids: list[int], seconds: float, accepted: int = 0) -> Answer:
    return Answer(0.0, ids, [1 + seconds * i for i in range(len(ids))], accepted, rejected=1)


def test_figures_are_ratios_of_speeds_and_count_every_id_that_differs() -> None:
    found = Measured()
    found.answers = {
        ("code", LOOP): [answered([1, 2, 3, 4], 0.06)],
        ("code", PRODUCT): [answered([1, 2, 3, 4], 0.02, accepted=3)],
        ("code", KNOWN): [answered([1, 2, 3, 4], 0.01)],
        ("edit", LOOP): [answered([1, 2, 3, 4], 0.06)],
        ("edit", PRODUCT): [answered([1, 9, 3], 0.01, accepted=1)],
    }
    found.link.up, found.link.up_frames, found.link.up_ids = 70, 7, 28
    found.rows = {"near": RowCounts(8, 1), "far": RowCounts(6, 0)}
    said = figures(found)
    assert said["real_speedup_code"] == pytest.approx(3)
    assert said["real_speedup_edit"] == pytest.approx(6)
    assert said["real_speedup_known"] == pytest.approx(6)
    assert said["real_in_turns_speedup_code"] is None
    assert (said["identical_tokens"], said["differing_tokens"]) == (10, 2)
    assert said["bytes_up_per_token"] == 10
    assert said["ids_per_draft_frame"] == 4
    assert said["wasted_rows_fraction"] == pytest.approx(1 - 10 / 14)
    assert said["real_late_rows_fraction"] == pytest.approx(1 / 14)
