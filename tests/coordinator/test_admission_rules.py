from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduling.admission import Running, Waiting, admit, reserved_tokens

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
        assert sum(reserved_tokens(e.rows) for e in [*chosen, *now]) <= capacity
        assert len(chosen) + len(now) <= slots
    for tenant in "abc":
        for again in (True, False):
            order = [e.key for e in entries if e.tenant == tenant and e.is_recovering == again]
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
