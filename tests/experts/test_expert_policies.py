"""Policies and slots: they keep their books straight on any traffic, and none beats knowing the future."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_kernels.flash_layer import ExpertSlots
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import UsageError
from edge_runtime.experts.policies import POLICIES
from edge_runtime.experts.replay import BELADY, replay
from edge_runtime.experts.retention import Retention
from edge_runtime.experts.slot_table import ABSENT, NATIVE_POLICY, Slots, SlotTable, make_slots
from edge_runtime.experts.trace import Access, RoutingTrace, decode_routing, read_trace

RECORDED = Path(__file__).parent / "data" / "qwen3_30b_4_layers_60_tokens.csv.gz"


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    top_k = draw(st.integers(1, min(3, experts)))
    accesses = []
    for step in range(draw(st.integers(1, 30))):
        for layer in range(layers):
            chosen = draw(st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True))
            accesses.append(Access(step, layer, tuple(chosen), (1,) * top_k, decode=True))
    return RoutingTrace(layers, experts, top_k, tuple(accesses))


@given(trace=traces(), extra=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_no_policy_beats_belady_and_all_miss_first_touches(trace: RoutingTrace, extra: int) -> None:
    slots = trace.top_k + extra
    best = replay(trace, slots, BELADY)
    touched = {(access.layer, expert) for access in trace.accesses for expert in access.experts}
    for policy in POLICIES:
        found = replay(trace, slots, policy)
        assert (
            found.hits + found.misses
            == best.hits + best.misses
            == sum(len(a.experts) for a in trace.accesses)
        )
        assert len(touched) <= found.misses
        assert sum(found.missed_by_access) == found.misses
        if trace.top_k == 1:  # with several at once, what is forced in may cost Belady one
            assert found.hits <= best.hits


@given(trace=traces())
@settings(max_examples=30, deadline=None)
def test_with_room_for_all_only_first_touches_miss(trace: RoutingTrace) -> None:
    touched = {(access.layer, expert) for access in trace.accesses for expert in access.experts}
    for policy in (*POLICIES, BELADY):
        assert replay(trace, trace.keys, policy).misses == len(touched)


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    slots=st.integers(1, 6),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.booleans()), max_size=60),
)
@settings(max_examples=80, deadline=None)
def test_a_slot_holds_one_expert_and_pinned_ones_stay(
    policy: str, slots: int, asked: list[tuple[int, int, bool]]
) -> None:
    table = SlotTable(slots, 10, POLICIES[policy](slots, 10))
    here: dict[int, int] = {}
    pinned: set[int] = set()
    for step, (key, rows, keeps) in enumerate(asked):
        slot = table.use(key, step, rows)
        assert slot == here.get(key, ABSENT)
        if slot == ABSENT:
            slot = table.admit(key, step, rows)
            if slot == ABSENT:
                assert len(pinned) == slots
                continue
            gone = [other for other, at in here.items() if at == slot]
            assert len(here) == slots if gone else len(here) < slots
            assert not pinned.intersection(gone)
            for other in gone:
                del here[other]
            here[key] = slot
        pinned.add(key)
        if not keeps:
            table.unpin(key)
            pinned.discard(key)
        assert len(set(here.values())) == len(here) == table.resident
        assert {other: table.slot(other) for other in here} == here


@given(
    slots=st.integers(1, 7),
    asked=st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "ask", "unpin", "unpin all", "forget", "hold", "release"]),
            st.integers(0, 9),
            st.integers(1, 40),
            st.integers(0, 2),
        ),
        max_size=120,
    ),
)
@settings(max_examples=200, deadline=None)
def test_the_native_table_decides_as_its_reference_does(
    slots: int, asked: list[tuple[str, int, int, int]]
) -> None:
    reference: Slots = SlotTable(slots, 10, POLICIES[NATIVE_POLICY](slots, 10))
    native = make_slots(slots, 10, NATIVE_POLICY)
    assert isinstance(native, ExpertSlots)
    step = 0
    for what, key, rows, pause in asked:
        step += pause
        if what == "ask":
            found = [table.use(key, step, rows) for table in (reference, native)]
            if found[0] == ABSENT:
                found += [table.admit(key, step, rows) for table in (reference, native)]
            assert found[::2] == found[1::2]
        for table in (reference, native):
            if what == "unpin":
                table.unpin(key)
            elif what == "unpin all":
                table.unpin_all()
            elif what == "forget":
                table.forget(key)
            elif what == "hold":
                table.hold(key % slots)
            elif what == "release":
                table.release(key % slots)
        assert [native.slot(key) for key in range(10)] == [reference.slot(key) for key in range(10)]
        assert [native.key(slot) for slot in range(slots)] == [reference.key(slot) for slot in range(slots)]
        assert (native.slots, native.resident) == (reference.slots, reference.resident)


def test_the_native_table_refuses_what_it_does_not_have() -> None:
    table = ExpertSlots(2, 3)
    for call in (table.slot, table.unpin, table.forget):
        with pytest.raises(ValueError, match="no such slot or key"):
            call(3)
    with pytest.raises(ValueError, match="no such slot or key"):
        table.key(-1)
    assert table.admit(1, 0, 1) == 0
    with pytest.raises(ValueError, match="can't be admitted"):
        table.admit(1, 0, 1)
    with pytest.raises(ValueError, match="needs slots and keys"):
        ExpertSlots(0, 3)


def test_lru_below_one_cycle_never_hits() -> None:
    """The cliff: what is asked for next was just thrown out."""
    accesses = tuple(
        Access(step, 0, (expert,), (1,), decode=True) for step in range(5) for expert in range(4)
    )
    trace = RoutingTrace(1, 4, 1, accesses)
    assert replay(trace, 3, "lru").hits == 0
    assert replay(trace, 4, "lru").hits == 16


def test_what_is_forgotten_leaves_its_slot() -> None:
    table = SlotTable(1, 2, POLICIES["lru"](1, 2))
    assert table.admit(0, 0, 1) == 0
    assert table.admit(1, 0, 1) == ABSENT
    table.forget(0)
    assert table.admit(1, 0, 1) == 0


def test_recorded_routing() -> None:
    trace = read_trace(RECORDED)
    assert (trace.layers, trace.experts, trace.top_k, trace.decoded_tokens) == (4, 128, 6, 32)
    assert not trace.accesses[0].decode
    assert sum(trace.accesses[0].rows) == 28 * 6  # the prompt is one batch
    quarter = trace.keys // 4
    rates = {policy: replay(trace, quarter, policy).hit_rate for policy in (*POLICIES, BELADY)}
    assert rates["lru"] > 0.5
    assert rates["lfru"] >= rates["lru"]
    assert rates[BELADY] - rates["lfru"] < 0.25  # 60 tokens: much is touched for the first time
    tokens = decode_routing(RECORDED)
    assert len(tokens) == 32
    assert all(len(chosen) == 6 for layers in tokens for chosen in layers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no routing"),
        ("# n_expert=4\n1,2,3\n", ":2 is not a row"),
        ("0,1,0,0,0,many\n", ":1: 'many' is not a whole number"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_trace(path)
    (tmp_path / "trace.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(UsageError, match="can't be read"):
        read_trace(tmp_path / "trace.csv.gz")


def test_a_batch_that_does_not_fit_is_refused() -> None:
    trace = RoutingTrace(1, 4, 2, (Access(0, 0, (0, 1), (1, 1), decode=True),))
    with pytest.raises(UsageError, match="1 slots do not hold the 2 experts"):
        replay(trace, 1, "lru")
    with pytest.raises(UsageError, match="not a policy"):
        replay(trace, 2, "clairvoyant")


@given(trace=traces(), extra=st.integers(0, 20), policy=st.sampled_from(sorted(POLICIES)))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_leaves_room_and_changes_no_count(trace: RoutingTrace, extra: int, policy: str) -> None:
    slots = trace.top_k + extra
    kept, plain = (replay(trace, slots, policy, keeps=keeps) for keeps in (True, False))
    assert kept.hits + kept.misses == plain.hits + plain.misses
    if slots // 2 <= trace.top_k:  # no room to keep anything
        assert kept == plain


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "lfu"])
def test_keeping_what_affinity_expects_changes_little_on_recorded_routing(policy: str) -> None:
    trace = read_trace(RECORDED)
    kept, plain = (replay(trace, trace.keys // 4, policy, keeps=keeps) for keeps in (True, False))
    assert abs(kept.hit_rate - plain.hit_rate) < 0.02


def test_what_is_kept_stays_until_it_is_let_go() -> None:
    table = SlotTable(4, 10, POLICIES["lru"](4, 10))
    for key in range(4):
        table.admit(key, 0, 1)
    table.unpin_all()
    retention = Retention()
    retention.keep(table, [0, 9, 1, 2], uses=0)  # half of the slots: 0 and 1
    assert [table.admit(key, 1, 1) == ABSENT for key in (4, 5, 6)] == [False, False, True]
    assert [table.slot(key) == ABSENT for key in range(4)] == [False, False, True, True]
    retention.let_go()
    assert table.admit(6, 1, 1) != ABSENT
    assert table.slot(0) == ABSENT
