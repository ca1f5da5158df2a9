"""Answers that no server should give: whatever they are, only ProtocolError comes of them, or ids."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import MAX_IDS, UNKNOWN, Dialect
from edge_runtime.speculative.verifiers.echo import Echo
from edge_runtime.speculative.verifiers.prefixes import Prefixes
from edge_runtime.speculative.verifiers.sglang import Sglang
from edge_runtime.speculative.verifiers.vllm import VllmPrompt
from tests.speculative.verifiers.test_dialects import NAMES, WINDOW, TestEcho, TestSglang, vllm_answer

SGLANG = TestSglang.answer(
    [[None, 12, None], [-0.1, 20, None], [-2.0, 21, None]],
    [None, [[-0.1, 20, None]], [[-0.3, 31, None]]],
    [40],
)
PREFIXES = {
    "choices": [
        {"index": place, "text": "", "token_ids": [token], "finish_reason": "length"}
        for place, token in enumerate((20, 31, 40))
    ]
}
DIALECTS: list[tuple[Dialect, dict[str, Any]]] = [
    (VllmPrompt("m", NAMES), vllm_answer()),
    (Prefixes("m", NAMES), PREFIXES),
    (Sglang(), SGLANG),
    (Echo("m", NAMES), TestEcho.answer(-2.0, {"<31>": -0.3})),
]
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["token_id:5", "token_id:x", "9" * 5000, "stop", "-Infinity"])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could be put instead."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [place for key, one in inner for place in [(*path, key), *places_of(one, (*path, key))]]


def check(dialect: Dialect, answer: dict[str, Any]) -> None:
    with contextlib.suppress(ProtocolError):
        verdict = dialect.read_verdict(WINDOW, answer)
        assert len(verdict.own) == 3
        assert all(token == UNKNOWN or 0 <= token < MAX_IDS for token in verdict.own)
    for read in (lambda: dialect.read_event(answer, 1), lambda: dialect.read_text_ids(answer)):
        with contextlib.suppress(ProtocolError):
            read()


@pytest.mark.parametrize(("dialect", "answer"), DIALECTS, ids=lambda one: getattr(one, "name", ""))
class TestStrange:
    def test_the_answer_itself_is_good(self, dialect: Dialect, answer: dict[str, Any]) -> None:
        assert dialect.read_verdict(WINDOW, answer).own == (20, 31, 40)

    @settings(max_examples=50, deadline=None)
    @given(data=st.data())
    def test_one_part_of_a_good_answer_is_something_else(
        self, dialect: Dialect, answer: dict[str, Any], data: st.DataObject
    ) -> None:
        changed = copy.deepcopy(answer)
        *path, last = data.draw(st.sampled_from(places_of(answer)))
        inner: Any = changed
        for key in path:
            inner = inner[key]
        inner[last] = data.draw(values)
        check(dialect, changed)

    @settings(max_examples=20, deadline=None)
    @given(strange=st.dictionaries(st.sampled_from(["choices", "meta_info", "output_ids", "usage"]), values))
    def test_anything_at_all(self, dialect: Dialect, answer: dict[str, Any], strange: dict[str, Any]) -> None:
        check(dialect, strange)
