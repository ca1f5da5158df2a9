"""The local API while nobody can be reached: unavailable, or the draft model, marked."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import openai
import pytest

from tests.support.breaking_proxy import BreakingProxy
from tests.support.fake_service import FakeService
from tests.support.local_api import CHAT, COMPLETION, IDS, STREAM, local, post


@pytest.fixture
def nobody(unused_tcp_port: int) -> str:
    return f"http://127.0.0.1:{unused_tcp_port}"


class TestOffline:
    async def test_without_leave_it_is_unavailable(self, nobody: str) -> None:
        async with local(nobody) as near:
            for body in (COMPLETION, COMPLETION | STREAM, COMPLETION | {"n": 2}):
                status, headers, answer = await post(near, "/v1/completions", body)
                assert (status, answer["error"]["code"]) == (503, "unreachable")
                assert headers["Retry-After"] == "2"

    async def test_the_draft_model_s_answers_carry_a_mark(self, nobody: str, draft: Path) -> None:
        async with local(nobody, draft=draft, offline="draft") as near:
            status, headers, body = await post(near, "/v1/completions", COMPLETION | IDS)
            assert (status, headers["X-Edge-Runtime-Answered-By"]) == (200, "draft")
            assert body["edge_runtime"]["answered_by"] == "draft"
            assert "nothing answers" in body["edge_runtime"]["reason"]
            assert (body["usage"]["completion_tokens"], body["seed"]) == (5, 3)
            _, headers, events = await post(near, "/v1/chat/completions", CHAT | STREAM | IDS)
            assert headers["X-Edge-Runtime-Answered-By"] == "draft"
            chunks = [json.loads(event.data) for event in events[:-1]]
            assert all(chunk["edge_runtime"]["answered_by"] == "draft" for chunk in chunks)
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            async with openai.AsyncOpenAI(base_url=near + "/v1", api_key="none") as client:
                assert [model.id async for model in client.models.list()] == ["tiny"]
                answer = await client.chat.completions.create(
                    model="tiny", messages=CHAT["messages"], max_tokens=3
                )  # type: ignore[arg-type]
                assert answer.model_extra is not None
                assert answer.model_extra["edge_runtime"]["answered_by"] == "draft"
            status, _, answer = await post(near, "/v1/completions", COMPLETION | {"surprise": 1})
            assert (status, answer["error"]["code"]) == (503, "unreachable")
            assert "surprise" in answer["error"]["message"]

    async def test_a_stream_that_breaks_for_good_is_marked_from_there_on(
        self, url: str, service: FakeService, draft: Path
    ) -> None:
        proxy = BreakingProxy(int(url.rpartition(":")[2]))
        async with proxy as broken, local(broken, draft=draft, offline="draft", resume_seconds=0.2) as near:
            await post(near, "/v1/completions", COMPLETION)
            service.hold = asyncio.Event()
            asked = COMPLETION | STREAM | IDS | {"ignore_eos": True}
            asking = asyncio.create_task(post(near, "/v1/completions", asked))
            await service.all_running(1)
            await asyncio.sleep(0.3)  # the first id is here
            await proxy.__aexit__()
            _, headers, events = await asking
        chunks = [json.loads(event.data) for event in events[:-1]]
        ids = [each for chunk in chunks for each in chunk["choices"][0].get("token_ids", ())]
        assert "X-Edge-Runtime-Answered-By" not in headers
        assert len(ids) == 5
        assert ids[0] == ord("a") + 3
        assert "edge_runtime" not in chunks[1]
        assert {chunk["edge_runtime"]["target_tokens"] for chunk in chunks[2:]} == {1}
