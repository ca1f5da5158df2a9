"""Bodies and answers of each dialect, as the servers write them."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.errors import ProtocolError
from edge_runtime.speculative.verifiers.base import UNKNOWN, Decoded, Window
from edge_runtime.speculative.verifiers.cheapest import Cheapest
from edge_runtime.speculative.verifiers.echo import Echo
from edge_runtime.speculative.verifiers.prefixes import Prefixes
from edge_runtime.speculative.verifiers.sglang import Sglang
from edge_runtime.speculative.verifiers.token_names import TokenNames
from edge_runtime.speculative.verifiers.vllm import VllmPrompt

WINDOW = Window((10, 11, 12), (20, 21))  # the server would write 20, 31, 40


class Letters:
    """Ids 0..99; 98 and 99 have the same text."""

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return 100

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return f"<{min(ids[0], 98)}>"


NAMES = TokenNames(Letters())


def vllm_answer(**changes: Any) -> dict[str, Any]:
    """Of WINDOW, as vLLM writes it with prompt_logprobs 1."""

    def entry(logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": "?"}

    places = [
        None,
        {"11": entry(-3.0, 7), "5": entry(-0.2, 1)},
        {"12": entry(-0.1, 1)},
        {"20": entry(-0.1, 1)},
        {"21": entry(-2.0, 3), "31": entry(-0.3, 1)},
    ]
    choice = {
        "index": 0,
        "text": "x",
        "token_ids": [40],
        "finish_reason": "length",
        "prompt_logprobs": places,
    }
    return {"choices": [{**choice, **changes}], "usage": {"prompt_tokens": 5}}


class TestVllm:
    dialect = VllmPrompt("m", NAMES)

    def test_the_prompt_is_ids_and_one_token_is_asked_for(self) -> None:
        body = self.dialect.verify_body(WINDOW)
        assert body["prompt"] == [10, 11, 12, 20, 21]
        assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0, 1)
        assert "prompt_logprobs" not in self.dialect.verify_body(Window((1,), ()))

    def test_rank_1_decides_and_the_miss_gives_the_server_s_own_token(self) -> None:
        verdict = self.dialect.read_verdict(WINDOW, vllm_answer())
        assert verdict.own == (20, 31, 40)
        assert verdict.accepted(WINDOW) == 1
        assert not verdict.ended
        assert self.dialect.read_verdict(WINDOW, vllm_answer(finish_reason="stop")).ended

    def test_what_it_says_of_its_cache_is_read(self) -> None:
        answer = vllm_answer()
        assert self.dialect.read_verdict(WINDOW, answer).cached_tokens is None
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 3}
        assert self.dialect.read_verdict(WINDOW, answer).cached_tokens == 3

    @pytest.mark.parametrize(
        ("place", "what"),
        [
            ({"21": {"logprob": -2.0, "rank": 3}}, "0 tokens of rank 1"),
            ({"21": {"logprob": -2.0, "rank": 1}, "31": {"logprob": -0.3, "rank": 1}}, "2 tokens of rank 1"),
            ({"31": {"logprob": -0.3, "rank": 1}}, "not once"),
            ({"21": {"logprob": -2.0, "rank": 1}, "31": {"logprob": -0.3, "rank": 2}}, "more probable"),
            ({"21": {"logprob": 0.5, "rank": 1}}, "above 0"),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, place: dict[str, Any], what: str) -> None:
        answer = vllm_answer()
        answer["choices"][0]["prompt_logprobs"][4] = place
        with pytest.raises(ProtocolError, match=what) as caught:
            self.dialect.read_verdict(WINDOW, answer)
        assert caught.value.code == "inconsistent_logprobs"

    def test_a_rank_may_be_off_by_what_rounding_does(self) -> None:
        answer = vllm_answer()
        answer["choices"][0]["prompt_logprobs"][4] = {
            "21": {"logprob": -0.6931, "rank": 2},
            "31": {"logprob": -0.6932, "rank": 1},
        }
        assert self.dialect.read_verdict(WINDOW, answer).own == (20, 31, 40)

    @pytest.mark.parametrize(
        "changes",
        [
            {"prompt_logprobs": None},
            {"prompt_logprobs": [None]},
            {"prompt_logprobs": [None] * 5},
            {"prompt_logprobs": [{"x": 1}] * 5},
            {"token_ids": []},
            {"token_ids": ["a"]},
            {"token_ids": [True]},
            {"token_ids": None},
            {"token_ids": [-4]},
        ],
    )
    def test_what_has_another_shape_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError):
            self.dialect.read_verdict(WINDOW, vllm_answer(**changes))

    @pytest.mark.parametrize(
        "answer", [{}, {"choices": []}, {"choices": {}}, {"choices": [None]}, {"choices": [3]}]
    )
    def test_what_is_no_answer_is_refused(self, answer: dict[str, Any]) -> None:
        with pytest.raises(ProtocolError):
            self.dialect.read_verdict(WINDOW, answer)

    def test_older_servers_name_ids_in_log_probabilities(self) -> None:
        answer = vllm_answer(token_ids=None, logprobs={"tokens": ["token_id:40"]})
        assert self.dialect.read_verdict(WINDOW, answer).own[-1] == 40

    def test_the_tokenizer_s_reading_begins_at_the_second_place(self) -> None:
        assert self.dialect.read_text_ids(vllm_answer()) == (11, 12, 20, 21)

    def test_events_bring_new_ids(self) -> None:
        event = {"choices": [{"index": 0, "text": "x", "token_ids": [7, 8], "finish_reason": None}]}
        assert self.dialect.read_event(event, 0) == Decoded((7, 8))
        event["choices"][0]["finish_reason"] = "stop"
        assert self.dialect.read_event(event, 5) == Decoded((7, 8), ended=True, finished=True)
        assert self.dialect.read_event({"choices": [], "usage": {}}, 5) == Decoded(())


class TestPrefixes:
    dialect = Prefixes("m", NAMES)

    def test_there_is_a_prompt_for_each_place(self) -> None:
        body = self.dialect.verify_body(WINDOW)
        assert body["prompt"] == [[10, 11, 12], [10, 11, 12, 20], [10, 11, 12, 20, 21]]
        assert "prompt_logprobs" not in body

    def test_choices_are_put_in_order(self) -> None:
        choices = [
            {"index": 2, "text": "", "token_ids": [40], "finish_reason": "stop"},
            {"index": 0, "text": "", "token_ids": [20], "finish_reason": "length"},
            {"index": 1, "text": "", "token_ids": [31], "finish_reason": "length"},
        ]
        verdict = self.dialect.read_verdict(WINDOW, {"choices": choices})
        assert verdict.own == (20, 31, 40)
        assert verdict.ended
        with pytest.raises(ProtocolError, match="2 of 3 prompts"):
            self.dialect.read_verdict(WINDOW, {"choices": choices[:2]})

    def test_long_texts_are_cheaper_this_way_and_short_ones_by_log_probabilities(self) -> None:
        both = Cheapest([VllmPrompt("m", NAMES), self.dialect])
        assert both.name == "vllm+prefixes"
        assert both.for_window(Window((1,) * 20, (2,) * 8)).name == "vllm"
        assert both.for_window(Window((1,) * 2000, (2,) * 8)).name == "prefixes"
        assert both.prompt_tokens(Window((1,) * 2000, (2, 3))) == 2000 + 2001 + 2002
        body = both.verify_body(Window((1,) * 2000, (2, 3)))
        assert len(body["prompt"]) == 3


class TestSglang:
    dialect = Sglang()

    @staticmethod
    def answer(given: list[Any], tops: list[Any], out: list[int]) -> dict[str, Any]:
        meta = {"input_token_logprobs": given, "input_top_logprobs": tops, "cached_tokens": 2}
        return {"output_ids": out, "meta_info": {**meta, "finish_reason": {"type": "length", "length": 1}}}

    def test_log_probabilities_are_asked_for_from_the_last_certain_id_on(self) -> None:
        body = self.dialect.verify_body(WINDOW)
        assert body["input_ids"] == [10, 11, 12, 20, 21]
        assert body["logprob_start_len"] == 2
        assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 1}

    @pytest.mark.parametrize("with_start", [True, False])
    def test_places_are_aligned_from_the_end(self, with_start: bool) -> None:
        given = [[None, 12, None], [-0.1, 20, None], [-2.0, 21, None]]
        tops = [None, [[-0.1, 20, None]], [[-0.3, 31, None]]]
        first = 0 if with_start else 1
        verdict = self.dialect.read_verdict(WINDOW, self.answer(given[first:], tops[first:], [40]))
        assert verdict.own == (20, 31, 40)
        assert verdict.cached_tokens == 2
        assert not verdict.ended

    @pytest.mark.parametrize(
        ("given", "tops", "out"),
        [
            ([[-0.1, 20, None]], [[[-0.1, 20, None]]], [40]),
            ([[-0.1, 20, None], [-0.2, 22, None]], [[[-0.1, 20, None]]] * 2, [40]),
            ([[-0.1, 20, None], [-0.2, 21, None]], [[[-0.1, 20, None]], [[-0.3, 31, None]]], [40]),
            ([[-0.1, 20, None], [-0.2, 21, None]], [[[-0.1, 20, None]], []], [40]),
            ([[-0.1, 20, None], [-0.2, 21, None]], [[[-0.1, 20, None]], [[-0.1, 31, None]]], []),
        ],
    )
    def test_what_does_not_fit_is_refused(self, given: list[Any], tops: list[Any], out: list[int]) -> None:
        with pytest.raises(ProtocolError):
            self.dialect.read_verdict(WINDOW, self.answer(given, tops, out))

    def test_events_hold_all_ids_or_the_new_ones(self) -> None:
        def event(ids: list[int], total: int, reason: Any = None) -> dict[str, Any]:
            return {"output_ids": ids, "meta_info": {"completion_tokens": total, "finish_reason": reason}}

        assert self.dialect.read_event(event([7], 1), 0) == Decoded((7,))
        assert self.dialect.read_event(event([7, 8, 9], 3), 1) == Decoded((8, 9))
        assert self.dialect.read_event(event([8, 9], 3), 1) == Decoded((8, 9))
        ended = self.dialect.read_event(event([7, 8], 2, {"type": "stop", "matched": 8}), 1)
        assert ended == Decoded((8,), ended=True, finished=True)
        with pytest.raises(ProtocolError, match="counts 9"):
            self.dialect.read_event(event([7], 9), 1)


class TestEcho:
    dialect = Echo("m", NAMES)

    @staticmethod
    def answer(last_draft: float, best: dict[str, float]) -> dict[str, Any]:
        logprobs = {
            "tokens": ["<10>", "<11>", "<12>", "<20>", "<21>", "<40>"],
            "token_logprobs": [None, -1.0, -1.0, -0.1, last_draft, -0.1],
            "top_logprobs": [None, {"<5>": -0.5}, {"<5>": -0.5}, {"<20>": -0.1}, best, {"<40>": -0.1}],
        }
        return {"choices": [{"index": 0, "text": "…", "logprobs": logprobs, "finish_reason": "length"}]}

    def test_names_say_what_the_server_would_have_written(self) -> None:
        assert self.dialect.verify_body(WINDOW)["echo"] is True
        verdict = self.dialect.read_verdict(WINDOW, self.answer(-2.0, {"<31>": -0.3}))
        assert verdict.own == (20, 31, 40)

    def test_a_name_that_two_ids_share_is_no_answer_except_for_the_draft_itself(self) -> None:
        assert NAMES.id_of("<98>") == NAMES.id_of("<nobody>") == UNKNOWN
        verdict = self.dialect.read_verdict(WINDOW, self.answer(-2.0, {"<98>": -0.3}))
        assert verdict.own == (20, UNKNOWN, 40)
        assert verdict.accepted(WINDOW) == 1
        window = Window(WINDOW.ids, (20, 99))
        answer = self.answer(-0.3, {"<98>": -0.3})
        answer["choices"][0]["logprobs"]["tokens"][4] = "<98>"
        assert self.dialect.read_verdict(window, answer).own == (20, 99, 40)

    @pytest.mark.parametrize(
        ("last_draft", "best"), [(-0.1, {"<31>": -0.3}), (-2.0, {}), (float("nan"), {"<31>": -0.3})]
    )
    def test_contradictions_are_refused(self, last_draft: float, best: dict[str, float]) -> None:
        with pytest.raises(ProtocolError):
            self.dialect.read_verdict(WINDOW, self.answer(last_draft, best))

    def test_another_prompt_than_the_one_sent_is_refused(self) -> None:
        with pytest.raises(ProtocolError, match="other tokens"):
            self.dialect.read_verdict(Window(WINDOW.ids, (20, 22)), self.answer(-2.0, {"<31>": -0.3}))
