"""Bodies read on the device against the coordinator's own reading of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.errors import ApiError
from coordinator.api.openai import chat, completions
from coordinator.api.openai.generation import fit, read_options
from coordinator.api.openai.messages import read_messages
from edge_runtime.errors import CapacityError, EdgeRuntimeError, UsageError
from edge_runtime.sdk.local_request import limit, plain_messages, read_request

SEED = 2**53 - 1
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text(max_size=5)), min_size=1)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": st.text() | PARTS},
        optional={"name": st.text(max_size=5)},
    ),
    min_size=1,
    max_size=4,
)
FIELDS = {
    "max_tokens": st.integers(1, 4096),
    "stop": st.text(min_size=1, max_size=9) | st.lists(st.text(min_size=1, max_size=9), max_size=4),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 500),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(st.integers(0, 255).map(str), st.floats(-100, 100), max_size=4),
    "ignore_eos": st.booleans(),
    "n": st.just(1),
    "user": st.text(),
    "stream": st.booleans(),
    "return_token_ids": st.booleans(),
}
BODIES = st.fixed_dictionaries({}, optional={name: st.none() | each for name, each in FIELDS.items()})


@given(BODIES, st.booleans(), st.integers(1, 2048))
def test_the_same_body_means_the_same(fields: dict[str, Any], is_chat: bool, prompt_tokens: int) -> None:
    body = {"model": "m", "messages" if is_chat else "prompt": "x", **fields}
    dialect = chat if is_chat else completions
    values = dialect.TABLE.read(body)
    values["max_tokens"], _ = dialect.max_tokens(values)
    expected = read_options(values, top_logprobs=-1, random_seed=SEED, vocab_size=256)
    found = read_request({**body, "seed": SEED} if fields.get("seed") is None else body)
    assert found.sampling == expected.sampling
    assert (found.max_tokens, found.stop) == (expected.max_tokens, expected.stop)
    assert found.ignore_eos == expected.ignore_eos
    try:
        wanted = fit(prompt_tokens, expected.max_tokens, 2048, param="prompt")
    except ApiError:
        with pytest.raises(CapacityError):
            limit(found, prompt_tokens, 2048)
    else:
        assert limit(found, prompt_tokens, 2048) == wanted


@given(MESSAGES)
def test_the_same_messages_reach_the_template(messages: list[dict[str, object]]) -> None:
    assert plain_messages(messages) == read_messages(messages)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": 0},
        {"logprobs": True},
        {"tools": [{}]},
        {"max_completion_tokens": 3},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": 1000},
        {"stop": [1]},
        {"stop": ""},
        {"seed": 0.5},
        {"max_tokens": 0},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [1]},
    ],
)
def test_what_the_target_alone_can_do_or_refuse_is_refused_here(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="offline"):
        read_request({"prompt": "x", "seed": 1, **fields})


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    ],
)
def test_messages_that_are_no_text_are_refused(messages: object) -> None:
    with pytest.raises(EdgeRuntimeError, match="offline"):
        plain_messages(messages)
