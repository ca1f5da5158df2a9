"""What the local API decides without a socket: who may come in, what it drafts for, whose memory is whose."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.cli.main import main
from edge_runtime.errors import UsageError
from edge_runtime.local_api.draftable import CHAT_PATH, COMPLETION_PATH, draftable
from edge_runtime.local_api.guard import LOOPBACK_NAMES, parse_address, refusal
from edge_runtime.local_api.users import User, Users
from edge_runtime.sdk.drafting import Drafting
from edge_runtime.sdk.http import HttpSession

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "prompt",
    "messages",
    "n",
    "logprobs",
    "stream",
    "stream_options",
    "return_token_ids",
    "kind",
    "resume",
)


class TestAddresses:
    def test_this_machine_is_the_default_and_others_must_be_meant(self) -> None:
        assert parse_address("127.0.0.1:8081") == ("127.0.0.1", 8081)
        assert parse_address("localhost:0") == ("localhost", 0)
        assert parse_address("[::1]:9") == ("::1", 9)
        for host in ("0.0.0.0", "192.168.1.4", "[::]", "example.org"):
            with pytest.raises(UsageError, match="other machines"):
                parse_address(f"{host}:80")
            assert parse_address(f"{host}:80", allow_remote=True)[1] == 80

    @pytest.mark.parametrize(
        "text", ["", "8081", ":8081", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "h:٣"]
    )
    def test_what_is_no_address(self, text: str) -> None:
        with pytest.raises(UsageError):
            parse_address(text, allow_remote=True)

    def test_the_command_line_says_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["draft", "--listen", "0.0.0.0:8081"]) == 2
        assert "--allow-remote" in capsys.readouterr().err
        assert main(["draft", "--listen", "127.0.0.1:0", "--draft", "sufix"]) == 2
        assert "no drafter" in capsys.readouterr().err

    def test_names_and_pages(self) -> None:
        def code(hosts: list[str], origins: list[str] | None = None, sites: list[str] | None = None) -> str:
            found = refusal(hosts, origins or [], sites or [], LOOPBACK_NAMES)
            return "" if found is None else found[0]

        assert code(["localhost:8081"]) == code(["[::1]:8081"]) == code(["127.0.0.1"]) == ""
        assert code(["localhost:1"], ["http://localhost:1"], ["same-origin"]) == ""
        assert (
            code([])
            == code(["localhost", "localhost"])
            == code(["localhost.evil.example"])
            == "host_not_allowed"
        )
        assert code(["localhost:1"], ["http://localhost:2"]) == "origin_not_allowed"
        assert (
            code(["localhost:1"], ["null"])
            == code(["localhost:1"], [], ["same-site"])
            == "origin_not_allowed"
        )


class TestDraftable:
    @given(
        st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from([CHAT_PATH, COMPLETION_PATH, "/v1/x"])
    )
    def test_what_is_taken_is_one_choice_of_one_prompt(self, body: dict[str, Any], path: str) -> None:
        found = draftable(path, json.dumps(body).encode())
        if found is None:
            return
        assert path != "/v1/x"
        assert not {"kind", "resume"} & body.keys()
        assert body.get("n") in (None, 1)
        assert body.get("logprobs") in ((None, False) if found.is_chat else (None,))
        assert found.body == body
        assert (found.stream, found.with_ids) == (
            body.get("stream") is True,
            body.get("return_token_ids") is True,
        )

    @given(st.binary(max_size=40))
    def test_any_bytes(self, data: bytes) -> None:
        assert draftable(COMPLETION_PATH, data) is None or b'"prompt"' in data

    def test_the_usual_requests(self) -> None:
        found = draftable(
            COMPLETION_PATH, b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": true}}'
        )
        assert found is not None
        assert (found.stream, found.include_usage, found.with_ids, found.is_chat) == (
            True,
            True,
            False,
            False,
        )
        assert draftable(COMPLETION_PATH, b'{"prompt": [1, 2]}') is not None
        assert draftable(CHAT_PATH, b'{"messages": []}') is not None
        for other in (
            b'{"prompt": "x", "prompt": "y"}',
            b'{"prompt": "x", "seed": Infinity}',
            b'{"prompt": [true]}',
        ):
            assert draftable(COMPLETION_PATH, other) is None


class TestUsers:
    @staticmethod
    def users(limit: int) -> Users:
        def make(key: str) -> User:
            http = HttpSession("http://127.0.0.1:1", key, 1.0)
            return User(http, Drafting(http, "suffix"))

        return Users(make, limit)

    async def test_a_key_is_kept_once_it_was_accepted(self) -> None:
        users = self.users(2)
        async with users.of("a") as stranger:
            assert not users.is_known("a")
        async with users.of("a") as first:
            assert first is not stranger
            first.was_accepted = True
        async with users.of("a") as again, users.of("b") as other:
            assert again is first
            assert other is not again
            assert other.drafting is not again.drafting
        assert users.is_known("a")
        assert not users.is_known("b")
        await users.close()

    async def test_whoever_was_away_longest_goes_and_nobody_who_is_busy(self) -> None:
        users = self.users(2)
        busy, done = asyncio.Event(), asyncio.Event()

        async def long_request() -> None:
            async with users.of("busy") as user:
                user.was_accepted = True
            async with users.of("busy"):
                busy.set()
                await done.wait()

        task = asyncio.create_task(long_request())
        await busy.wait()
        for key in ("a", "b", "a", "c"):
            async with users.of(key) as user:
                user.was_accepted = True
        assert [users.is_known(key) for key in ("busy", "a", "b", "c")] == [True, False, False, True]
        done.set()
        await task
        assert users.is_known("busy")
        await users.close()

    async def test_two_first_requests_of_one_key_end_well(self) -> None:
        users = self.users(2)
        async with users.of("a") as one, users.of("a") as two:
            one.was_accepted = two.was_accepted = True
        assert users.is_known("a")
        await users.close()
