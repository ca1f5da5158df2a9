"""The small pure parts: ids, seeds, log-probabilities, tables, errors, status as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.admin import fingerprint, status_json
from coordinator.api.errors import KINDS, ApiError, error_body, kind_of
from coordinator.api.openai import chat, completions, embeddings
from coordinator.api.openai.generation import fit
from coordinator.api.openai.logprobs import LOWEST, CompletionLogprobs, TokenText, chat_entry
from coordinator.api.openai.parameters import Table
from coordinator.api.openai.ticket import Ticket, choice_id, read_ticket
from edge_runtime import errors
from edge_runtime.core import TokenLogprob
from edge_runtime.server_events import encode_event
from tests.support.fake_service import FakeService

DOCS = Path(__file__).parents[2] / "docs" / "http_api.md"
TICKETS = st.builds(
    Ticket,
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(1, 64),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(min_size=12, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(TICKETS, st.text(min_size=1, max_size=8, alphabet="abcdef"))
def test_an_id_says_what_it_was_made_of_to_its_tenant_only(ticket, tenant):
    request_id = ticket.id(tenant)
    assert read_ticket(request_id, tenant) == ticket
    assert read_ticket(request_id, tenant + "x") is None
    assert request_id.isascii()
    assert choice_id(request_id, 3) == f"{request_id}.3"


@given(TICKETS, st.data())
def test_no_other_text_is_an_id(ticket, data):
    request_id = ticket.id("lab")
    at = data.draw(st.integers(0, len(request_id) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126))
    changed = request_id[:at] + other + request_id[at + 1 :]
    assert read_ticket(changed, "lab") is None or changed == request_id or at == len(request_id) - 1
    assert read_ticket(request_id.upper(), "lab") is None
    assert read_ticket(request_id + "a", "lab") is None


@given(st.text(max_size=80))
def test_any_text_can_be_asked_for(text):
    assert read_ticket(text, "lab") is None


def test_what_fits_and_what_does_not():
    assert fit(100, None, 128, param="prompt") == 28
    assert fit(100, None, 1 << 20, param="prompt") == 1024
    assert fit(100, 28, 128, param="prompt") == 28
    for prompt_tokens, max_tokens in ((128, None), (200, 1), (100, 29)):
        with pytest.raises(ApiError) as caught:
            fit(prompt_tokens, max_tokens, 128, param="prompt")
        assert caught.value.code == "context_length_exceeded"
        assert "128" in caught.value.message
        assert str(prompt_tokens) in caught.value.message


def test_a_tokens_text_is_what_it_adds():
    def decode(ids):  # as tokenizers do that drop the space before the first word
        return "".join((" a", " b", "\ufffd", "")[i] for i in ids).removeprefix(" ")

    text = TokenText(decode)
    assert text(0, 1) == " b"
    assert text(None, 1) == "b"
    assert text(2, 1) == "b"
    assert text(0, 2) == "\ufffd"


def test_log_probabilities_are_json():
    text = TokenText(lambda ids: "ab\ufffd"[ids[-1]])
    entry = chat_entry(text, None, 2, TokenLogprob(-math.inf, ((0, -0.1), (2, -math.inf))))
    assert (entry["logprob"], entry["bytes"]) == (LOWEST, None)
    json.dumps(entry, allow_nan=False)
    both = CompletionLogprobs.of(text, None, 1, TokenLogprob(-2.0, ((0, -0.1),)), 5)
    assert both.body() == {
        "tokens": ["b"],
        "token_logprobs": [-2.0],
        "top_logprobs": [{"a": -0.1, "b": -2.0}],
        "text_offset": [5],
    }


def test_events_are_one_line_of_data():
    data = encode_event({"text": "a\n\u2028\u2029\x85é"}, event_id="x/1", name="status")
    assert data == 'event: status\nid: x/1\ndata: {"text":"a\\n\\u2028\\u2029\\u0085é"}\n\n'.encode()
    assert len(data.decode().splitlines()) == 4


def test_every_error_of_ours_has_a_status():
    """Codes that have no row are bugs of ours to the caller, and stay 500."""
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    for kind in tree:
        status = kind_of(kind("it broke")).status
        assert status in {row.status for row in KINDS.values()}
    assert kind_of(errors.CapacityError("x", code="overloaded")).status == 429
    assert kind_of(errors.TamperedError("x")).status == 500
    assert error_body(errors.PlanError("No plan.", hint="add a device")) == {
        "error": {
            "message": "No plan.",
            "type": "server_error",
            "param": None,
            "code": "plan",
            "hint": "add a device",
        }
    }


def test_status_is_json_and_only_news_is_news():
    status = FakeService().status()
    phone = replace(status.devices[0], rtt_seconds=math.nan, last_seen_seconds=math.inf)
    shown = status_json(replace(status, devices=(phone,)))
    json.dumps(shown, allow_nan=False)
    assert shown["devices"][0]["rtt_seconds"] is None
    later = replace(
        status, uptime_seconds=101.0, devices=(replace(status.devices[0], last_seen_seconds=9.0),)
    )
    now = replace(status, devices=status.devices[:1])
    assert fingerprint(status_json(later)) == fingerprint(status_json(now))
    assert fingerprint(status_json(status)) != fingerprint(status_json(now))


@pytest.mark.parametrize("table", [chat.TABLE, completions.TABLE, embeddings.TABLE])
def test_the_documentation_lists_every_parameter(table: Table):
    docs = DOCS.read_text(encoding="utf-8")
    for parameter in table.parameters:
        assert f"| `{parameter.name}` | {parameter.takes} |" in docs
    for harmless in table.harmless:
        assert f"`{harmless.name}` ({harmless.accepts})" in docs


def test_the_documentation_lists_every_code():
    docs = DOCS.read_text(encoding="utf-8")
    for code, kind in KINDS.items():
        assert f"| `{code}` | {kind.status} | `{kind.type}` |" in docs
