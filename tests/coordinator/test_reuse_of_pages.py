"""What the coordinator asks devices to keep and to reuse, over real links with scripted agents."""

from __future__ import annotations

from dataclasses import replace

from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import (
    NOBODY_ASKS,
    PAGE_NAME_BYTES,
    CloseSession,
    OpenSession,
    RowsHeld,
    SessionFailed,
)
from tests.support.coordinator_world import World, collect, request, until, world
from tests.support.fake_agents import FakeAgent, undisturbed

LONG = tuple(range(100))


def opened(w: World) -> list[OpenSession]:
    return w.cluster.opened()


async def closed(w: World, name: str, session: int) -> CloseSession:
    def found() -> list[CloseSession]:
        return [m for m in w.cluster.told_to(name, CloseSession) if m.session == session]

    await until(found)
    return found()[0]


async def test_pages_of_the_prompt_are_named_before_and_those_of_the_answer_after(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        first = replace(request("1", count=60), prompt_ids=LONG)
        answer = [event.id for event in await collect(w.runtime.generate(first))]
        opening = opened(w)[0]
        assert len(opening.page_names) == 3 * PAGE_NAME_BYTES
        assert opening.held_rows == 3 * PAGE_TOKENS
        closing = await closed(w, "b", opening.session)
        assert closing == await closed(w, "a", opening.session)
        # 160 ids, the last of which was never run: four full pages, three of them named before
        assert closing.ids == (*LONG, *answer)[96:128]
        assert len(closing.page_names) == PAGE_NAME_BYTES
        # the next turn of the conversation begins with all of it
        following = replace(request("2"), prompt_ids=(*LONG, *answer, 7))
        await collect(w.runtime.generate(following))
        assert opened(w)[1].page_names[: 4 * PAGE_NAME_BYTES] == opening.page_names + closing.page_names


async def test_the_last_row_of_a_prompt_is_never_reused(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        for rows, pages in ((64, 1), (65, 2), (32, 0), (2, 0)):
            await collect(w.runtime.generate(replace(request(f"r{rows}", count=1), prompt_ids=LONG[:rows])))
            opening = opened(w)[-1]
            assert len(opening.page_names) == pages * PAGE_NAME_BYTES
            assert opening.held_rows == (pages * PAGE_TOKENS or NOBODY_ASKS)


async def test_tenants_and_nobody_else_share_names(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        for name, tenant in (("1", "one"), ("2", "one"), ("3", "two")):
            await collect(w.runtime.generate(replace(request(name), prompt_ids=LONG, tenant=tenant)))
        one, again, two = (opening.page_names for opening in opened(w))
        assert one == again
        assert not {one[at : at + 16] for at in range(0, 48, 16)} & {
            two[at : at + 16] for at in range(0, 48, 16)
        }


async def test_where_rows_depend_on_their_neighbours_nothing_is_shared(tmp_path):
    async with world(tmp_path) as w:
        await w.start("a")
        await w.serve("b", row_invariant=False)
        await collect(w.runtime.generate(replace(request(), prompt_ids=LONG)))
        opening = opened(w)[0]
        assert (opening.page_names, opening.held_rows) == (b"", NOBODY_ASKS)
        assert (await closed(w, "a", opening.session)).page_names == b""


async def test_what_was_reused_is_told_with_the_first_token(tmp_path):
    async with world(tmp_path) as w:
        _, tail = await w.serve("a", "b")
        w.cluster.pace.allow(0)
        events: list = []
        task = w.cluster.tasks.create_task(
            collect(w.runtime.generate(replace(request(), prompt_ids=LONG)), events)
        )
        await until(lambda: opened(w))
        opening = opened(w)[0]
        await say_held(tail, opening, 64, reused=True)
        await say_held(tail, opening, 100, reused=False)
        await until(lambda: len([m for m in w.runtime.sessions.sessions if m._held_rows == 100]) == 1)
        w.cluster.pace.allow_all()
        await task
        assert [event.cached_tokens for event in events] == [64] + [0] * 7
        assert [event.id for event in events] == undisturbed(LONG, 7, 8)


async def say_held(tail: FakeAgent, opening: OpenSession, rows: int, *, reused: bool) -> None:
    await tail.send(RowsHeld(opening.session, opening.lease, rows, reused))


async def test_a_session_that_is_opened_again_asks_for_its_pages_again(tmp_path):
    async with world(tmp_path) as w:
        await w.serve("a", "b")
        w.cluster.answer = lambda opening, feed: (
            SessionFailed(opening.session, opening.lease, "engine", "lost") if len(opened(w)) == 1 else None
        )
        events = await collect(w.runtime.generate(replace(request(), prompt_ids=LONG)))
        assert [event.id for event in events] == undisturbed(LONG, 7, 8)
        first, second = opened(w)
        assert first.page_names == second.page_names
        failed = await closed(w, "a", first.session)
        assert (failed.page_names, failed.ids) == (b"", ())
