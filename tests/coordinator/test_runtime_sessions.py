"""The coordinator over real links with scripted agents: promises about requests, whatever devices do."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from coordinator.journal.memory import MemoryJournal
from coordinator.service import TokenEvent
from edge_runtime.core import RequestId, Token
from edge_runtime.errors import CapacityError, RequestFailed, TrustError, UsageError
from edge_runtime.protocol import codec
from edge_runtime.protocol.messages import CloseSession, Gap, Hello, LoadStage, Refused, SessionFailed, Tokens
from edge_runtime.transport import zeromq
from edge_runtime.trust.identity import KeyPair
from edge_runtime.trust.pairing import enroll
from edge_runtime.trust.tokens import JoinLink
from tests.support.coordinator_world import FAST, PROMPT, collect, request, until, world
from tests.support.fake_agents import FakeAgent, undisturbed

# ---------------------------------------------------------------- serving


async def test_a_request_is_journalled_served_and_closed_everywhere(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        events = await collect(w.runtime.generate(request()))
        assert [event.id for event in events] == undisturbed(PROMPT, 7, 8)
        assert [event.finish_reason for event in events] == [""] * 7 + ["length"]
        assert "".join(event.text for event in events) == w.runtime.decode([event.id for event in events])
        found = await w.journal.request(RequestId("r"))
        assert found is not None
        assert found.finish_reason == "length"
        assert found.entry.class_map == ("fake-1",) * 4
        assert [token.id for token in found.tokens] == [event.id for event in events]
        await until(lambda: all(w.cluster.told_to(name, CloseSession) for name in "ab"))
        assert w.runtime.status().plan.stages == (("a", 0, 1), ("b", 2, 3))


async def test_tokens_are_in_the_journal_before_anybody_sees_them(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        async for event in w.runtime.generate(request()):
            found = await w.journal.request(RequestId("r"))
            assert found is not None
            assert len(found.tokens) > event.index


async def test_stop_strings_end_the_request_and_the_session(tmp_path):
    text = bytes(undisturbed(PROMPT, 7, 8))
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        whole = "".join(event.text for event in await collect(w.runtime.generate(request("whole"))))
        assert len(whole) == len(text)
        stop = whole[3:5]
        events = await collect(w.runtime.generate(request("r", stop=(stop,))))
        assert "".join(event.text for event in events) == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"
        session = w.cluster.opened()[-1].session
        await until(
            lambda: all(
                session in {m.session for m in w.cluster.told_to(name, CloseSession)} for name in "ab"
            )
        )


async def test_closing_the_iterator_frees_the_devices_and_the_stream_can_be_resumed(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        w.cluster.pace.allow(3)
        seen = []
        async with aclosing(w.runtime.generate(request())) as events:
            async for event in events:
                seen.append(event)
                if event.index == 2:
                    break
        await until(lambda: all(w.cluster.told_to(name, CloseSession) for name in "ab"))
        await until(lambda: not w.runtime.status().requests)
        w.cluster.pace.allow_all()
        rest = await collect(await w.runtime.resume(RequestId("r"), 1))
        assert [event.index for event in rest] == [2, 3, 4, 5, 6, 7]
        assert [e.id for e in seen[:2]] + [e.id for e in rest] == undisturbed(PROMPT, 7, 8)
        again = await collect(await w.runtime.resume(RequestId("r"), -1))
        assert [event.id for event in again] == undisturbed(PROMPT, 7, 8)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_a_reader_who_comes_back_while_the_last_one_s_leaving_is_noticed_gets_the_rest(tmp_path, turns):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        w.cluster.pace.allow(3)
        stream = w.runtime.generate(request())
        seen = [await anext(stream) for _ in range(3)]
        await stream.aclose()
        resumed = await w.runtime.resume(RequestId("r"), 2)
        for _ in range(turns):  # of the event loop
            await asyncio.sleep(0)
        w.cluster.pace.allow_all()
        rest = await collect(resumed)
        assert [e.id for e in seen + rest] == undisturbed(PROMPT, 7, 8)


async def test_an_unknown_request_cannot_be_resumed(tmp_path):
    async with world(tmp_path) as w:
        with pytest.raises(UsageError):
            await w.runtime.resume(RequestId("nothing"), 0)


async def test_many_requests_share_the_pipeline(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b", kv_tokens=128)
        results = await asyncio.gather(
            *(collect(w.runtime.generate(request(f"r{seed}", 8, seed))) for seed in range(12))
        )
        for seed, events in enumerate(results):
            assert [event.id for event in events] == undisturbed(PROMPT, seed, 8)


async def test_what_can_never_fit_is_refused_with_both_numbers(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b", kv_tokens=64)
        with pytest.raises(CapacityError, match=r"96 tokens.*64"):
            await collect(w.runtime.generate(request(count=90)))
        with pytest.raises(CapacityError, match="512") as raised:
            await collect(w.runtime.generate(request(count=600)))
        assert raised.value.code == "context_length_exceeded"


async def test_a_full_queue_is_said_at_once(tmp_path):
    async with world(tmp_path, max_waiting=1) as w:
        await w.serve("a", "b", kv_tokens=32)
        w.cluster.pace.allow(0)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(collect(w.runtime.generate(request(f"r{i}")))) for i in range(2)]
            await until(lambda: len(w.runtime.loop.state.waiting) == 1 and w.cluster.opened())
            with pytest.raises(CapacityError) as raised:
                await collect(w.runtime.generate(request("r9")))
            assert raised.value.code == "overloaded"
            w.cluster.pace.allow_all()
        assert all([e.id for e in task.result()] == undisturbed(PROMPT, 7, 8) for task in running)


async def test_encoders_give_one_vector_per_sequence(tmp_path):
    async with world(tmp_path, "encoder") as w:
        await w.serve("a", "b")
        vectors = await w.runtime.embed([[1, 2], [5, 6, 7]])
        assert [vector[0] for vector in vectors] == [3.0, 18.0]
        with pytest.raises(UsageError, match="encoder"):
            await collect(w.runtime.generate(request()))
        await w.runtime.probe()


async def test_the_probe_says_why_nothing_can_be_served(tmp_path):
    async with world(tmp_path) as w:
        with pytest.raises(RequestFailed, match="no device is connected"):
            await w.runtime.probe()
        await w.serve("a", "b")
        await w.runtime.probe()
        assert w.cluster.opened()[-1].max_rows == 2


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_device_that_dies_is_replaced_and_the_stream_has_no_seam(tmp_path, victim):
    async with world(tmp_path) as w:
        agents = await w.serve("a", "b")
        await w.start("spare")
        await until(lambda: any(d.name == "spare" and d.state == "ready" for d in w.runtime.status().devices))
        w.cluster.pace.allow(3)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(w.runtime.generate(request(count=20)), seen))
            await until(lambda: len(seen) == 3)
            await agents[victim].die()
            await until(lambda: len(w.cluster.opened()) == 2)
            w.cluster.pace.allow_all()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 20)
        assert [event.index for event in seen] == list(range(20))
        first, second = w.cluster.opened()
        assert second.lease > first.lease
        assert second.session != first.session
        assert (second.prompt_rows, second.forced_rows, second.max_rows) == (2, 5, 22)
        survivor = agents[1 - victim]
        loads = w.cluster.told_to(survivor.name, LoadStage)
        assert {(load.first_layer, load.last_layer) for load in loads} == {(0, 1) if victim else (2, 3)}


async def test_without_a_spare_the_others_take_over(tmp_path):
    async with world(tmp_path) as w:
        agents = await w.serve("a", "b")
        w.cluster.pace.allow(2)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(w.runtime.generate(request()), seen))
            await until(lambda: len(seen) == 2)
            await agents[1].die()
            w.cluster.pace.allow_all()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 8)
        assert w.runtime.status().plan.stages == (("a", 0, 3),)


async def test_a_replacement_of_another_class_fails_the_session_in_words(tmp_path):
    async with world(tmp_path) as w:
        agents = await w.serve("a", "b")
        await w.start("other", class_name="fake-2")
        await until(lambda: any(d.name == "other" and d.state == "ready" for d in w.runtime.status().devices))
        w.cluster.pace.allow(2)
        seen: list[TokenEvent] = []
        running = asyncio.ensure_future(collect(w.runtime.generate(request()), seen))
        await until(lambda: len(seen) == 2)
        await agents[0].die()
        await agents[1].die()
        with pytest.raises(RequestFailed, match=r"class 'fake-1'.*class 'fake-2'"):
            await running
        found = await w.journal.request(RequestId("r"))
        assert found is not None
        assert "fake-2" in found.error


async def test_a_gap_is_fed_again_under_a_new_session_number(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        answers = iter([lambda o: Gap(o.session, o.lease, 1)])
        w.cluster.answer = lambda opening, feed: next(answers, lambda o: None)(opening)
        events = await collect(w.runtime.generate(request()))
        assert [event.id for event in events] == undisturbed(PROMPT, 7, 8)
        first, second = w.cluster.opened()
        assert (first.lease, first.session + 1) == (second.lease, second.session)


async def test_a_session_that_keeps_failing_ends_with_the_last_reason(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        w.cluster.answer = lambda o, feed: SessionFailed(
            o.session, o.lease, "engine", "the rows are not finite"
        )
        with pytest.raises(RequestFailed, match=r"3 times in a row.*not finite"):
            await collect(w.runtime.generate(request()))


async def test_a_pipeline_that_falls_silent_is_opened_again(tmp_path):
    async with world(tmp_path, stall_seconds=0.05) as w:
        await w.serve("a", "b")
        w.cluster.pace.allow(0)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(w.runtime.generate(request()), seen))
            await until(lambda: len(w.cluster.opened()) == 2)
            w.cluster.pace.allow_all()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 8)


async def test_late_and_repeated_tokens_change_nothing(tmp_path):
    async with world(tmp_path) as w:
        _, tail = await w.serve("a", "b")
        w.cluster.pace.allow(2)
        seen: list[TokenEvent] = []
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(collect(w.runtime.generate(request()), seen))
            await until(lambda: len(seen) == 2)
            opening = w.cluster.opened()[0]
            for lease, session in (
                (opening.lease - 1, opening.session),
                (opening.lease, opening.session + 99),
            ):
                await tail.send(Tokens(session, lease, 0, (Token(4, 200),)))
            await tail.send(Tokens(opening.session, opening.lease, 0, (Token(2, 200), Token(3, 201))))
            await tail.send(Tokens(opening.session, opening.lease, 0, (Token(9, 1),)))  # a hole: fed again
            w.cluster.pace.allow_all()
        assert [event.id for event in seen] == undisturbed(PROMPT, 7, 8)


async def test_a_device_that_cannot_load_is_left_out_with_its_reason(tmp_path):
    async with world(tmp_path, limits=replace(FAST, exclude_seconds=30.0)) as w:
        agents = await w.start("a", "b")
        agents[1].fails_to_load = "out of memory"
        await asyncio.wait_for(w.runtime.loop.serving.wait(), 10)
        assert w.runtime.status().plan.stages == (("a", 0, 3),)
        (status,) = [device for device in w.runtime.status().devices if device.name == "b"]
        assert (status.state, status.reason) == ("excluded", "out of memory")


async def test_a_restarted_coordinator_goes_on_with_what_it_accepted(tmp_path):
    journal = MemoryJournal()
    async with world(tmp_path, journal=journal) as w:
        agents, port = await w.serve("a", "b"), w.runtime.port
        w.cluster.pace.allow(3)
        seen: list[TokenEvent] = []
        running = asyncio.ensure_future(collect(w.runtime.generate(request()), seen))
        await until(lambda: len(seen) == 3)
    with pytest.raises(RequestFailed, match="stopped"):
        await running
    async with world(tmp_path, journal=journal) as w:
        assert w.runtime.port == port  # paired devices know no other
        for old in agents:
            agent = FakeAgent(w.cluster, old.name)
            agent.key, agent.device_id = old.key, old.device_id
            await agent.join(w.runtime, boot_id="boot-2")
        rest = await collect(await w.runtime.resume(RequestId("r"), 2))
    assert [e.id for e in seen] + [e.id for e in rest] == undisturbed(PROMPT, 7, 8)


# ---------------------------------------------------------------- who gets in


async def test_a_stranger_is_not_admitted_and_a_join_link_works_once(tmp_path):
    async with world(tmp_path) as w:
        key = KeyPair.generate()
        with pytest.raises(TrustError):
            await zeromq.connect(
                f"tcp://127.0.0.1:{w.runtime.port}", key, w.runtime.registry.keys.link.public
            )
        link = JoinLink.parse(w.runtime.create_join_link())
        pairing = await enroll(link, key, "phone")
        assert pairing.signing_key == w.runtime.registry.keys.signing.public
        assert [device.name for device in w.runtime.status().devices] == ["phone"]
        with pytest.raises(TrustError, match="used already"):
            await enroll(link, KeyPair.generate(), "thief")


async def test_a_revoked_device_is_cut_off_and_stays_out(tmp_path):
    async with world(tmp_path) as w:
        a, _ = await w.serve("a", "b")
        await w.runtime.revoke("a")
        await asyncio.wait_for(a.gone.wait(), 5)
        with pytest.raises(TrustError):
            await a.join(w.runtime)
        (status,) = [device for device in w.runtime.status().devices if device.name == "a"]
        assert status.state == "revoked"
        await until(lambda: w.runtime.status().plan.stages == (("b", 0, 3),))
        with pytest.raises(UsageError, match="no device"):
            await w.runtime.revoke("nobody")


async def test_another_protocol_version_is_refused_in_words(tmp_path):
    async with world(tmp_path) as w:
        agent = FakeAgent(w.cluster, "old")
        await agent.pair(w.runtime)
        connection = await zeromq.connect(
            f"tcp://127.0.0.1:{w.runtime.port}", agent.key, w.runtime.registry.keys.link.public
        )
        await connection.send(codec.encode(Hello(7, "0.0.1", "old", "boot", "", 1, 1, 0)))
        refused, _ = codec.decode(await connection.receive())
        assert isinstance(refused, Refused)
        assert refused.code == "protocol_version"
        assert "protocol 7" in refused.reason
        assert refused.hint
        await connection.close()


async def test_an_agent_that_breaks_the_protocol_is_cut_and_the_rest_serve_on(tmp_path, caplog):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        (rogue,) = await w.start("rogue")
        await until(lambda: any(d.name == "rogue" and d.state == "ready" for d in w.runtime.status().devices))
        await rogue.connection.send([b"\xff\xff\xff"])
        await asyncio.wait_for(rogue.gone.wait(), 5)
        await until(lambda: "device" in caplog.text and "can't be read" in caplog.text)
        events = await collect(w.runtime.generate(request()))
        assert [event.id for event in events] == undisturbed(PROMPT, 7, 8)


async def test_a_rejoin_replaces_and_counts_once(tmp_path):
    async with world(tmp_path) as w:
        a, _ = await w.serve("a", "b")
        first_lease = w.runtime.status().plan.lease
        await a.join(w.runtime, boot_id="boot-2")
        await until(lambda: w.runtime.status().plan.lease > first_lease and w.runtime.status().plan.ready)
        assert len(w.runtime.status().devices) == 2
        events = await collect(w.runtime.generate(request()))
        assert [event.id for event in events] == undisturbed(PROMPT, 7, 8)
