"""The official client against the app on a real socket: what it sends is understood, what it gets it can read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import openai
import pytest

from edge_runtime.errors import CapacityError, RequestFailed
from tests.support.fake_service import ENCODER, FakeService

ADMIN_KEY = "sk-edge-admin-000000000000"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., openai.AsyncOpenAI]]:
    """Clients of servers, closed after the test."""
    made = []

    def connect_one(server, key: str = ADMIN_KEY) -> openai.AsyncOpenAI:
        made.append(openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0))
        return made[-1]

    yield connect_one
    for client in made:
        await client.close()


@pytest.fixture
def client(server, connect) -> openai.AsyncOpenAI:
    return connect(server)


async def test_chat(client):
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, seed=0, max_completion_tokens=5
    )
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "abcde"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len("<user>hello<assistant>")
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.model_extra["seed"] == 0
    assert answer._request_id == answer.id


async def test_tokens_that_needed_no_computing_are_told_once_per_prompt(server, client):
    server.service.cached_tokens = 2
    answer = await client.completions.create(model="tiny", prompt=["abcd", "abce"], n=3, max_tokens=2)
    assert answer.usage.prompt_tokens == 8
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    async with server.http.get(f"{server.url}/metrics") as response:
        text = await response.text()
    assert 'edge_runtime_prefix_cache_queries_total{model_name="tiny"} 24.0' in text
    assert 'edge_runtime_prefix_cache_hits_total{model_name="tiny"} 12.0' in text


async def test_chat_stream_with_usage(client):
    stream = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        seed=2,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "cde"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_chat_stream_helper(client):
    async with client.chat.completions.stream(model="tiny", messages=HELLO, seed=0, stop="e") as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "abcd"


async def test_completion(client):
    answer = await client.completions.create(model="tiny", prompt="x", seed=1, max_tokens=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == "bcde"
    assert answer.choices[1].text != "bcde"
    assert answer.usage.prompt_tokens == 1
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("prompt", ["hi", ["hi", "yo"], [104, 105], [[104, 105], [121]]])
async def test_every_form_of_prompt(client, prompt):
    answer = await client.completions.create(model="tiny", prompt=prompt, seed=0, max_tokens=2)
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert [choice.text for choice in answer.choices] == ["ab"] * len(prompts)
    assert answer.usage.prompt_tokens == sum(len(each) for each in prompts)


async def test_stop_and_stream_agree(client):
    asked = {"model": "tiny", "prompt": "x", "seed": 0, "max_tokens": 20, "stop": ["zzz", "ef"]}
    whole = await client.completions.create(**asked)
    stream = await client.completions.create(**asked, stream=True)
    assert whole.choices[0].text == "abcd"
    assert whole.choices[0].finish_reason == "stop"
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "abcd"


async def test_chat_logprobs(client):
    answer = await client.chat.completions.create(
        model="tiny", messages=HELLO, seed=0, max_tokens=2, logprobs=True, top_logprobs=2
    )
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [top.token for top in second.top_logprobs] == ["b", "c"]


async def test_completion_logprobs(client):
    answer = await client.completions.create(model="tiny", prompt="x", seed=0, max_tokens=3, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}]
    assert logprobs.text_offset == [0, 1, 2]


async def test_sampling_parameters_reach_the_service(client, server):
    seen = []
    generate = server.service.generate
    server.service.generate = lambda request: (seen.append(request), generate(request))[1]
    await client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=1,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100},
        seed=-1,
        extra_body={
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.1,
        1.0,
        -1.0,
    )
    assert sampling.logit_bias == ((5, -100.0),)
    assert sampling.seed == 2**64 - 1
    assert seen[0].ignore_eos


async def test_token_ids_on_request(client):
    asked = {"model": "tiny", "seed": 0, "max_tokens": 2, "extra_body": {"return_token_ids": True}}
    whole = await client.completions.create(prompt=[104], **asked)
    assert whole.choices[0].model_extra == {"prompt_token_ids": [104], "token_ids": [97, 98]}
    stream = await client.completions.create(prompt=[104], stream=True, **asked)
    chunks = [chunk.choices[0].model_extra async for chunk in stream]
    assert chunks[0]["prompt_token_ids"] == [104]
    assert [each for chunk in chunks for each in chunk.get("token_ids", [])] == [97, 98]
    chat = await client.chat.completions.create(messages=HELLO, **asked)
    assert chat.model_extra["prompt_token_ids"] == list(b"<user>hello<assistant>")
    assert chat.choices[0].model_extra["token_ids"] == [97, 98]


async def test_a_seed_nobody_gave_is_reported_and_repeats(client):
    first = await client.completions.create(model="tiny", prompt="x", max_tokens=8)
    again = await client.completions.create(
        model="tiny", prompt="x", max_tokens=8, seed=first.model_extra["seed"]
    )
    assert first.choices[0].text == again.choices[0].text


async def test_models(client):
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    model = await client.models.retrieve("tiny")
    assert model.model_extra["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_embeddings(start, connect, encoding):
    client = connect(await start(FakeService(model=ENCODER)))
    given = {} if encoding is None else {"encoding_format": encoding}
    answer = await client.embeddings.create(model="tiny-encoder", input=["ab", "c"], **given)
    vectors = [each.embedding for each in answer.data]
    if encoding == "base64":
        assert all(isinstance(vector, str) for vector in vectors)
    else:
        assert vectors == [[2.0, 97.0, 195.0, 0.25], [1.0, 99.0, 99.0, 0.25]]
    assert answer.usage.prompt_tokens == 3
    ids = await client.embeddings.create(model="tiny-encoder", input=[97, 98], dimensions=4)
    assert ids.data[0].embedding == [2.0, 97.0, 195.0, 0.25]


async def test_a_model_of_the_other_kind_refuses_clearly(client, start, connect):
    with pytest.raises(openai.BadRequestError, match="generator") as caught:
        await client.embeddings.create(model="tiny", input="x")
    assert caught.value.code == "model_cannot"
    encoder = connect(await start(FakeService(model=ENCODER)))
    with pytest.raises(openai.BadRequestError, match="encoder"):
        await encoder.completions.create(model="tiny-encoder", prompt="x")


async def test_a_long_prompt_is_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="x" * 200)
    assert caught.value.code == "context_length_exceeded"
    assert "128" in caught.value.message
    assert "200" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt="x" * 100, max_tokens=29)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    answer = await client.completions.create(model="tiny", prompt="x" * 100, max_tokens=28)
    assert answer.usage.total_tokens == 128


async def test_the_default_length_is_what_is_left(client):
    answer = await client.completions.create(model="tiny", prompt="x" * 100)
    assert answer.usage.completion_tokens == 28


async def test_errors_map_to_the_clients_exceptions(start, server, connect):
    with pytest.raises(openai.AuthenticationError):
        await connect(server, "sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        await connect(server).completions.create(model="huge", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        await connect(server).chat.completions.create(
            model="tiny", messages=HELLO, tools=[{"type": "function"}]
        )
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    full = connect(await start(FakeService(max_running=0)))
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as limited:
            await full.completions.create(model="tiny", prompt="x", stream=stream)
        assert limited.value.response.headers["Retry-After"] == "1"
    loading = connect(await start(FakeService(ready=False)))
    with pytest.raises(openai.InternalServerError) as unready:
        await loading.completions.create(model="tiny", prompt="x")
    assert unready.value.status_code == 503
    never = connect(await start(FakeService(error=CapacityError("It needs more memory than there is."))))
    with pytest.raises(openai.BadRequestError):
        await never.completions.create(model="tiny", prompt="x")


async def test_a_failure_inside_a_stream_is_told_in_it(start, connect):
    service = FakeService(error=RequestFailed("The last device left."), error_after=2)
    client = connect(await start(service))
    stream = await client.completions.create(model="tiny", prompt="x", seed=0, stream=True)
    texts = []

    async def follow() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].text)

    with pytest.raises(openai.APIError, match="The last device left"):
        await follow()
    assert texts == ["a", "b"]
    with pytest.raises(openai.InternalServerError, match="The last device left"):
        await client.completions.create(model="tiny", prompt="x")
