"""Names of pages: equal where everything a page is a function of is equal, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.sessions.page_names import PageNames
from edge_runtime.engine.page_table import PAGE_TOKENS
from edge_runtime.protocol.messages import PAGE_NAME_BYTES

SECRET = bytes(range(32))
NAMES = PageNames(SECRET, "sha256:one")
CLASSES = ("onnx/1", "onnx/1", "onnx/2")
ids_lists = st.lists(st.integers(0, 300_000), max_size=4 * PAGE_TOKENS)


def split(names: bytes) -> list[bytes]:
    assert len(names) % PAGE_NAME_BYTES == 0
    return [names[at : at + PAGE_NAME_BYTES] for at in range(0, len(names), PAGE_NAME_BYTES)]


@given(ids_lists, ids_lists)
def test_two_chains_are_alike_as_long_as_their_ids_are(one: list[int], two: list[int]) -> None:
    names, others = (split(NAMES.chain("t", CLASSES, ids)) for ids in (one, one[:40] + two))
    assert len(names) == len(one) // PAGE_TOKENS
    for index, (name, other) in enumerate(zip(names, others, strict=False)):
        end = (index + 1) * PAGE_TOKENS
        assert (name == other) == (one[:end] == (one[:40] + two)[:end])


@given(ids_lists, st.integers(0, 4))
def test_a_chain_goes_on_from_any_of_its_names(ids: list[int], first: int) -> None:
    whole = NAMES.chain("t", CLASSES, ids)
    head = whole[: first * PAGE_NAME_BYTES]
    first = len(head) // PAGE_NAME_BYTES
    rest = NAMES.chain("t", CLASSES, ids[first * PAGE_TOKENS :], after=head[-PAGE_NAME_BYTES:])
    assert head + rest == whole


IDS = tuple(range(PAGE_TOKENS))
ALIKE = [
    NAMES.chain("t", CLASSES, IDS),
    NAMES.chain("u", CLASSES, IDS),
    NAMES.chain("t", CLASSES[:2], IDS),
    NAMES.chain("t", ("onnx/1onnx/1", "onnx/2"), IDS),
    NAMES.chain("t", CLASSES[::-1], IDS),
    NAMES.chain("t", CLASSES, IDS, adapter="a"),
    NAMES.chain("t", CLASSES, IDS, after=b"x" * PAGE_NAME_BYTES),
    NAMES.chain("t", CLASSES, IDS[::-1]),
    PageNames(SECRET, "sha256:two").chain("t", CLASSES, IDS),
    PageNames(bytes(32), "sha256:one").chain("t", CLASSES, IDS),
]


def test_a_name_depends_on_everything_a_page_does() -> None:
    assert len({*ALIKE}) == len(ALIKE)
    assert {len(name) for name in ALIKE} == {PAGE_NAME_BYTES}
