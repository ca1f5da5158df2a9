"""Greedy drafts against a real server with a real model, in every dialect: the same ids, and what they cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from edge_runtime.errors import (
    CapacityError,
)
from edge_runtime.speculative.drafters.base import Proposal
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from edge_runtime.speculative.verifiers import pace
from tests.support.model_server import DEMO
from tests.support.remote_verifiers import COPY, ENDING, WAYS, Serve, eager, plain, verifier_of


class TestSameIds:
    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_ids_are_those_that_the_server_decodes_by_itself(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        server = await serve(owner)
        copied = (
            80 if dialect in ("vllm", "echo") else 200
        )  # those two have the server compute all of it each time
        for prompt, count in ((COPY, copied), ('"""Doc."""\n', 60)):
            expected = (await plain(server, prompt, 200))[:count]
            async with verifier_of(server, dialect=dialect) as verifier:
                stream = verifier.stream(prompt, max_tokens=count)
                await anext(aiter(stream))
                eager(verifier)
                async for _ in stream:
                    pass
            assert list(stream.result.token_ids) == expected
            assert stream.result.text == server.tokenizer.decode(expected)
            assert stream.result.finish_reason == "length"
            assert stream.usage.windows > 2
            # What is copied is foreseen. Of 60 other ids a slow server's own stream may bring most before a draft is.
            assert stream.usage.accepted_drafts > (10 if prompt == COPY else 0)

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_drafts_that_are_wrong_cost_time_and_change_nothing(
        self, serve: Serve, owner: str, dialect: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A third of them, where nobody can foresee."""
        honest = SuffixDrafter.propose
        coin = random.Random(5)

        def unreliable(self: SuffixDrafter, count: int, width: int = 1) -> Proposal:
            found = honest(self, count, width)
            ids = tuple((token + (coin.random() < 0.3)) % 4096 for token in found.ids)
            return replace(found, ids=ids)

        monkeypatch.setattr(SuffixDrafter, "propose", unreliable)
        monkeypatch.setattr(pace, "LEAST_AHEAD", 0.0)  # a second window is sent, however unlikely
        server = await serve(owner)
        expected = (await plain(server, COPY, 200))[:60]
        async with verifier_of(server, dialect=dialect) as verifier:
            await verifier.server()
            eager(verifier)
            stream = verifier.stream(COPY, max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == expected
        assert stream.usage.rejected_drafts > 5
        assert server.most_at_once <= 3  # two windows, and one that was given up and still runs

    @pytest.mark.parametrize(("owner", "dialect"), WAYS)
    async def test_a_text_ends_where_the_server_would_end_it(
        self, serve: Serve, owner: str, dialect: str
    ) -> None:
        """The end itself is drafted: the same text with its end stands in the prompt."""
        server = await serve(owner)
        encode = server.tokenizer.encode
        ids = encode(ENDING).ids
        end = await server.plain(ids, 100)
        assert end[-1] == 0
        assert len(end) == 11
        prompt = [*ids, *end, *ids]
        expected = await server.plain(prompt, 100)
        assert expected[-1] == 0
        async with verifier_of(server, dialect=dialect) as verifier:
            await verifier.server()
            eager(verifier)
            for again in range(2):  # what the special token means is learnt the first time
                before = verifier.requests
                result = await verifier.generate(prompt, max_tokens=100)
                assert list(result.token_ids) == expected
                assert result.finish_reason == "stop"
                assert result.accepted_draft_tokens > 3
                if again:
                    # how many windows there are depends on how fast the server just was
                    assert verifier.requests - before < len(expected)
            longer = await verifier.generate(prompt, max_tokens=30, ignore_eos=True)
            assert len(longer.token_ids) == 30
            assert list(longer.token_ids[: len(expected)]) == expected

    async def test_an_end_that_is_no_special_token_is_named_by_the_caller(self, serve: Serve) -> None:
        server = await serve("sglang")
        whole = (await plain(server, COPY, 200))[:80]
        end = whole[60]
        server.ends = (0, end)
        expected = whole[: whole.index(end) + 1]
        async with verifier_of(server, stop_token_ids=[end]) as verifier:
            await verifier.server()
            eager(verifier)
            result = await verifier.generate(COPY, max_tokens=80)
        assert list(result.token_ids) == expected
        assert result.finish_reason == "stop"

    async def test_stop_strings_end_the_text_before_them(self, serve: Serve) -> None:
        server = await serve("vllm")
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            whole = await verifier.generate(COPY, max_tokens=60)
            stop = whole.text[40:46]
            found = await verifier.generate(COPY, max_tokens=60, stop=stop)
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finish_reason == "stop"

    async def test_a_context_that_is_full_ends_the_text(self, serve: Serve) -> None:
        server = await serve("sglang")
        prompt = (server.tokenizer.encode(COPY).ids * 40)[:1010]
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            result = await verifier.generate(prompt, max_tokens=100)
            assert len(result.token_ids) == 14
            assert result.finish_reason == "length"
            with pytest.raises(CapacityError) as caught:
                await verifier.generate(prompt + prompt[:14], max_tokens=1)
            assert caught.value.code == "context_length_exceeded"


class TestWhatItCosts:
    @pytest.mark.parametrize("owner", ["vllm", "sglang"])
    async def test_a_copy_takes_far_fewer_requests_than_tokens(self, serve: Serve, owner: str) -> None:
        server = await serve(owner)
        server.faults.token_seconds = (
            0.03  # a large model: a token takes long, a window no longer than a token
        )
        async with verifier_of(server) as verifier:
            stream = verifier.stream(COPY, max_tokens=120)
            async for _ in stream:
                pass
        assert stream.usage.requests / len(stream.result.token_ids) < 0.5
        assert stream.usage.accepted_drafts > 60

    async def test_sglang_computes_drafts_alone_and_vllm_s_log_probabilities_everything(
        self, serve: Serve
    ) -> None:
        computed = {}
        for owner, dialect in (("sglang", "sglang"), ("vllm", "vllm"), ("vllm", "prefixes")):
            server = await serve(owner)
            prompt = server.tokenizer.encode(COPY * 3).ids
            async with verifier_of(server, dialect=dialect) as verifier:
                await verifier.server()
                eager(verifier)
                before = server.brain.computed_rows
                stream = verifier.stream(prompt, max_tokens=120)
                async for _ in stream:
                    pass
            computed[dialect] = (server.brain.computed_rows - before - len(prompt)) / 120
            if dialect != "vllm":
                assert stream.usage.cached_tokens > 0.5 * stream.usage.prompt_tokens
        assert computed["sglang"] < 3
        assert computed["prefixes"] < 8
        assert computed["vllm"] > 6

    async def test_drafts_that_bring_nothing_leave_the_server_s_own_stream(self, serve: Serve) -> None:
        """k = 0: a fast server far away."""
        server = await serve("vllm")
        server.faults.seconds = 0.15
        async with verifier_of(server) as verifier:
            stream = verifier.stream("import os\n\n\nprint(", max_tokens=30)
            async for _ in stream:
                pass
        assert stream.usage.requests <= 4

    async def test_while_drafts_are_right_the_next_window_is_on_its_way(self, serve: Serve) -> None:
        server = await serve("sglang")
        async with verifier_of(server) as verifier:
            await verifier.server()
            eager(verifier)
            before = server.most_at_once
            server.faults.company_seconds = (
                1.0  # longer than a window takes to draft, however busy the machine
            )
            stream = verifier.stream(COPY, max_tokens=200)
            async for _ in stream:
                pass
        server.faults.company_seconds = 0.0
        assert list(stream.result.token_ids) == await plain(server, COPY, 200)
        assert (before, server.most_at_once) == (1, 2)

    async def test_no_drafter_at_all_is_one_request(self, serve: Serve) -> None:
        server = await serve("sglang")
        async with verifier_of(server, draft="none") as verifier:
            stream = verifier.stream(COPY, max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == (await plain(server, COPY, 200))[:60]
        assert stream.usage.requests == 1

    async def test_a_draft_model_with_the_same_tokenizer_drafts_what_is_new(self, serve: Serve) -> None:
        server = await serve("sglang")
        server.faults.token_seconds = 0.05
        async with verifier_of(server, draft=DEMO) as verifier:
            stream = verifier.stream("def add(a, b):\n    return a", max_tokens=60)
            async for _ in stream:
                pass
        assert list(stream.result.token_ids) == await server.plain("def add(a, b):\n    return a", 60)
        assert stream.usage.requests < 30
        assert stream.usage.accepted_drafts > 25
