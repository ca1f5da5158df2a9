"""Bodies of every kind: what is wrong is refused by name, and nothing a caller sends makes the server fail."""

from __future__ import annotations

import asyncio
import io
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.api.body import MAX_BODY_BYTES
from coordinator.api.openai import chat, completions, embeddings
from tests.support.api_server import ADMIN_KEY
from tests.support.fake_service import ENCODER, FakeService

CHAT: dict[str, object] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
COMPLETION: dict[str, object] = {"model": "tiny", "prompt": "hi", "max_tokens": 1}


async def post(server, path: str, body: object) -> tuple[int, dict]:
    async with server.http.post(server.url + path, data=to_bytes(body), headers=JSON) as response:
        text = await response.text()
        return response.status, {} if response.content_type == "text/event-stream" else json.loads(text)


def to_bytes(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


JSON = {"Content-Type": "application/json"}

WRONG = [
    ("temperature", [-0.1, 2.1, True, "1", [], {}, 10**400, 1e308]),
    ("top_p", [0, -1, 1.01, "x", True]),
    ("top_k", [-2, 1.5, 2**40, True, "3"]),
    ("min_p", [-0.01, 1.01, None.__class__.__name__]),
    ("presence_penalty", [-2.01, 2.01, "0"]),
    ("frequency_penalty", [-2.01, 2.01, False]),
    ("repetition_penalty", [0, -1, 101, "1"]),
    ("n", [0, -1, 17, 1.0, True, "2"]),
    ("seed", [2**64, -(2**63) - 1, 1.5, "7", True]),
    ("max_tokens", [0, -1, 2**31, 2**63, 1.5, True, "5"]),
    ("stop", [["a"] * 5, [""], "", [1], 5, {}, ["x" * 257], [["a"]]]),
    ("logit_bias", [[], {"a": 1}, {"1": 101}, {"1": -101}, {"-1": 1}, {"256": 1}, {"1": "x"}, {"1": True}]),
    ("logit_bias", [{str(i): 0 for i in range(1025)}, {"9" * 11: 0}, {"1": 1, "01": 1}]),
    ("stream", [1, "true", []]),
    ("stream_options", [{"include_usage": True}, [], {"x": 1}, {"include_usage": 1}]),
    ("ignore_eos", [0, "no"]),
    ("return_token_ids", [0, "no"]),
    ("model", [1, [], {}]),
    ("echo", [True]),
    ("best_of", [2, 0, True]),
    ("suffix", ["x"]),
    ("tools", [[{"type": "function"}]]),
    ("response_format", [{"type": "json_object"}]),
    ("no_such_parameter", [1, None, False]),
    ("x" * 1000, [1]),
    ("", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values"), WRONG)
async def test_a_wrong_value_is_refused_by_the_name_of_its_field(server, name, values):
    for path, good in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        for value in values:
            status, answer = await post(server, path, good | {name: value})
            assert status == 400, (name, value, answer)
            assert answer["error"]["param"] == name[:64]
            assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x"}, "model"),
        ("/v1/completions", {"model": "tiny"}, "prompt"),
        ("/v1/completions", {"model": "tiny", "prompt": None}, "prompt"),
        ("/v1/chat/completions", {"model": "tiny"}, "messages"),
        ("/v1/completions", COMPLETION | {"prompt": ""}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": []}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": [[]]}, "prompt[0]"),
        ("/v1/completions", COMPLETION | {"prompt": [256]}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": [-1]}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": [1, True]}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": ["x", 1]}, "prompt[1]"),
        ("/v1/completions", COMPLETION | {"prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": ["x"] * 65}, "prompt"),
        ("/v1/completions", COMPLETION | {"prompt": ["x"] * 33, "n": 2}, "n"),
        ("/v1/completions", COMPLETION | {"logprobs": 21}, "logprobs"),
        ("/v1/completions", COMPLETION | {"logprobs": True}, "logprobs"),
        ("/v1/completions", COMPLETION | {"max_completion_tokens": 5}, "max_completion_tokens"),
        ("/v1/completions", COMPLETION | {"messages": []}, "messages"),
        ("/v1/chat/completions", CHAT | {"prompt": "x"}, "prompt"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 1}, "top_logprobs"),
        ("/v1/chat/completions", CHAT | {"logprobs": 5}, "logprobs"),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 2}, "max_completion_tokens"),
        ("/v1/chat/completions", CHAT | {"messages": []}, "messages"),
        ("/v1/chat/completions", CHAT | {"messages": "hi"}, "messages"),
        ("/v1/chat/completions", CHAT | {"messages": ["hi"]}, "messages[0]"),
        ("/v1/chat/completions", CHAT | {"messages": [{"content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": []}]},
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            CHAT
            | {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}
                ]
            },
            "messages[0].content[0]",
        ),
        (
            "/v1/chat/completions",
            CHAT | {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
    ],
)
async def test_what_is_missing_or_misshapen_is_named(server, path, body, param):
    status, answer = await post(server, path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


async def test_what_the_official_clients_send_by_habit_is_accepted(server):
    habits = {
        "user": "me", "metadata": {}, "store": False, "service_tier": "auto", "stop": None, "seed": None, "n": None,
        "logit_bias": {}, "stream_options": None, "temperature": None, "stream": False, "top_k": -1,
    }  # fmt: skip
    chat_habits = {
        "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"},
        "modalities": ["text"], "functions": None, "audio": None, "top_logprobs": None, "logprobs": False,
    }  # fmt: skip
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "me",
        },
        {
            "role": "assistant",
            "content": "c",
            "refusal": None,
            "tool_calls": None,
            "audio": None,
            "annotations": [],
        },
        {"role": "user", "content": ""},
    ]
    del chat_habits["functions"], chat_habits["audio"]
    status, answer = await post(
        server, "/v1/chat/completions", CHAT | habits | chat_habits | {"messages": messages}
    )
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len("<system>be brief<user>ab<assistant>c<user><assistant>")
    status, answer = await post(
        server, "/v1/completions", COMPLETION | habits | {"echo": False, "best_of": 1, "suffix": None}
    )
    assert status == 200, answer


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model":NaN}',
        b'{"temperature":Infinity}', b'{"temperature":1e999}', b'{"n":1,"n":2}', b'{"prompt":"\\ud800"}',
        b'{"model":"tiny","n":' + b"9" * 5000 + b"}", b'{"\\udfff":1}', b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
async def test_what_is_no_json_object_is_refused(server, body):
    status, answer = await post(server, "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


async def test_limits_of_a_body(server):
    url = f"{server.url}/v1/completions"
    async with server.http.post(url, data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1)), headers=JSON) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"
    async with server.http.post(url, data=b"{}", headers={"Content-Type": "text/plain"}) as response:
        assert response.status == 415
    async with server.http.post(url, data=b"{}", headers=JSON | {"Content-Encoding": "gzip"}) as response:
        assert response.status == 415


async def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("coordinator.api.body.READ_SECONDS", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        "Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{".encode()
    )
    async with asyncio.timeout(5):
        assert b" 408 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_broken_http_leaves_the_server_running(server):
    for data in (b"\0" * 100, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                 b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 5000 + b"\r\n"):  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        async with asyncio.timeout(5):
            assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    chunked = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(chunked.encode())
    async with asyncio.timeout(5):
        assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert (await post(server, "/v1/completions", COMPLETION))[0] == 200


NAMES = sorted(
    {
        each.name  # type: ignore[attr-defined]
        for table in (chat.TABLE, completions.TABLE, embeddings.TABLE)
        for each in (*table.parameters, *table.harmless)
    }
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "tiny-encoder", "user", "text", "base64", "float", "auto"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["role", "content", "type", "text", "1"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"]) | VALUES, "content": VALUES}
    ),
    max_size=3,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4) | st.dictionaries(
    st.text(max_size=5), VALUES, max_size=2
)
ROUTES = st.sampled_from(
    [
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", CHAT),
        ("/v1/embeddings", {"model": "tiny-encoder", "input": "x"}),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=ROUTES, fields=FIELDS, messages=st.none() | MESSAGES)
async def test_no_body_makes_the_server_fail(both, route, fields, messages):
    """4xx with an error object, or an answer: never 5xx, never something else."""
    path, good = route
    body = (
        good
        | fields
        | ({"messages": messages} if messages is not None and path.startswith("/v1/chat") else {})
    )
    server = both[path == "/v1/embeddings"]
    async with server.http.post(server.url + path, data=json.dumps(body).encode(), headers=JSON) as response:
        text = await response.text()
        assert response.status == 200 or 400 <= response.status < 500, (body, text)
        if response.status != 200:
            error = json.loads(text)["error"]
            assert error["message"]
            assert error["code"]
        elif response.content_type == "text/event-stream":
            assert text.endswith("data: [DONE]\n\n")
        else:
            assert json.loads(text)["object"] in ("chat.completion", "text_completion", "list")
    assert not server.service.running


@pytest.fixture
async def both(start):
    return await start(FakeService()), await start(FakeService(model=ENCODER))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=60)
    | st.text(alphabet='{}[]":,0123456789.eE+-truefalsn\\u ', max_size=60).map(str.encode)
)
async def test_no_bytes_make_the_server_fail(server, data):
    status, _ = await post(server, "/v1/completions", data)
    assert status == 400


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_numbers_json_does_not_have_are_refused(server, value):
    status, answer = await post(server, "/v1/completions", COMPLETION | {"temperature": value})
    assert (status, answer["error"]["code"]) == (400, "invalid_json")
