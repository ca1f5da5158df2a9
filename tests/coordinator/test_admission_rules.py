from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduling.admission import Running, Waiting, reserved_tokens
from coordinator.scheduling.assignment import Room, assign


def admit(waiting, running, *, capacity_tokens: int, max_running: int) -> list[str]:
    """Of one pipeline."""
    room = Room(1, capacity_tokens, 1.0, ("x",), tuple(running))
    return [key for key, _ in assign(waiting, [room], max_running=max_running)]


SESSIONS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 300), st.booleans()), max_size=12)


def queue(found: list[tuple[str, int, bool]]) -> list[Waiting]:
    return [Waiting(str(n), tenant, n, rows, again) for n, (tenant, rows, again) in enumerate(found)]


@given(SESSIONS, SESSIONS, st.integers(0, 1000), st.integers(0, 6))
def test_memory_and_slots_are_never_overdrawn_and_tenants_keep_their_order(waiting, running, capacity, slots):
    now = [Running(tenant, rows) for tenant, rows, _ in running]
    entries = queue(waiting)
    keys = admit(entries, now, capacity_tokens=capacity, max_running=slots)
    chosen = [entry for entry in entries if entry.key in keys]
    assert len(set(keys)) == len(keys)
    if chosen:
        assert (
            sum(reserved_tokens(rows) for rows in [*(e.rows for e in chosen), *(e.rows for e in now)])
            <= capacity
        )
        assert len(chosen) + len(now) <= slots
    for tenant in "abc":
        for again in (True, False):
            # What can never fit is refused elsewhere.
            fitting = [e for e in entries if reserved_tokens(e.rows) <= capacity]
            order = [e.key for e in fitting if e.tenant == tenant and e.is_recovering == again]
            assert [key for key in keys if key in order] == order[: len([k for k in keys if k in order])]


@given(SESSIONS)
def test_with_room_for_all_everybody_gets_in(waiting):
    assert len(admit(queue(waiting), [], capacity_tokens=1 << 20, max_running=99)) == len(waiting)


def test_a_large_request_at_the_head_is_not_passed_for_ever():
    entries = [Waiting("large", "a", 0, 96, False), Waiting("small", "b", 1, 32, False)]
    assert admit(entries, [Running("c", 64)], capacity_tokens=128, max_running=9) == []
    assert admit(entries, [], capacity_tokens=128, max_running=9) == ["large", "small"]


def test_one_tenant_with_many_requests_does_not_hold_up_another():
    entries = [Waiting(f"a{n}", "a", n, 32, False) for n in range(9)] + [Waiting("b", "b", 9, 32, False)]
    assert admit(entries, [Running("a", 32)], capacity_tokens=128, max_running=9) == ["b", "a0", "a1"]


def test_interrupted_sessions_go_first():
    entries = [Waiting("new", "a", 0, 32, False), Waiting("old", "a", 1, 32, True)]
    assert admit(entries, [], capacity_tokens=32, max_running=9) == ["old"]


# ---------------------------------------------------------------- several pipelines

ROOMS = st.lists(st.tuples(st.integers(0, 600), st.floats(0.1, 100.0), st.sampled_from("xy")), max_size=3)


@given(SESSIONS, ROOMS, st.integers(0, 12))
def test_every_session_gets_one_pipeline_of_its_class_that_has_room(waiting, found, slots):
    rooms = [Room(n, tokens, speed, (kind,)) for n, (tokens, speed, kind) in enumerate(found, 1)]
    entries = [
        Waiting(str(n), tenant, n, rows, again, ("xy"[n % 2],) if n % 3 else ())
        for n, (tenant, rows, again) in enumerate(waiting)
    ]
    by_key = {entry.key: entry for entry in entries}
    chosen = assign(entries, rooms, max_running=slots)
    assert len({key for key, _ in chosen}) == len(chosen) <= slots
    for room in rooms:
        taken = [by_key[key] for key, lease in chosen if lease == room.lease]
        assert sum(reserved_tokens(entry.rows) for entry in taken) <= room.capacity_tokens
        assert all(entry.class_map in ((), room.class_map) for entry in taken)


def test_sessions_spread_by_speed_and_a_prefix_outweighs_it():
    fast, slow = Room(1, 1024, 30.0, ("x",)), Room(2, 1024, 10.0, ("x",))
    entries = [Waiting(str(n), "t", n, 32, False, ("x",)) for n in range(8)]
    leases = [lease for _, lease in assign(entries, [fast, slow], max_running=99)]
    assert leases.count(1) == 6
    there = [Waiting("p", "t", 0, 32, False, ("x",), preferred_lease=2)]
    assert assign(there, [fast, slow], max_running=99) == [("p", 2)]
    full = Room(2, 32, 10.0, ("x",), (Running("t", 32),))
    assert assign(there, [fast, full], max_running=99) == [("p", 1)]


def test_who_waits_for_one_class_does_not_hold_up_another():
    full, free = Room(1, 64, 1.0, ("x",), (Running("t", 64),)), Room(2, 64, 1.0, ("y",))
    entries = [Waiting("x1", "t", 0, 32, True, ("x",)), Waiting("y1", "t", 1, 32, False, ("y",))]
    assert assign(entries, [full, free], max_running=9) == [("y1", 2)]
