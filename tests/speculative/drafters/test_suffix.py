"""The suffix drafter against a trie of all runs, going back, budgets, and one user's memory apart from another's."""

from __future__ import annotations

import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.core import SamplingParams
from edge_runtime.errors import ConfigError, UsageError
from edge_runtime.speculative.drafters.choose import make_drafter
from edge_runtime.speculative.drafters.suffix import SuffixDrafter
from edge_runtime.speculative.drafters.suffix_memory import SuffixMemory
from edge_runtime.speculative.drafters.suffix_paths import SEPARATOR
from edge_runtime.speculative.drafters.suffix_tree import SuffixTree

GREEDY = SamplingParams(temperature=0.0)
ids_lists = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def counts_of_runs(ids: list[int]) -> Counter[tuple[int, ...]]:
    """The reference: how often each run of ids stands in the text."""
    return Counter(tuple(ids[i:j]) for i in range(len(ids)) for j in range(i + 1, len(ids) + 1))


def reference_best(ids: list[int], count: int) -> float:
    """Largest score over all lengths of match, the paths' ties left open."""
    runs = counts_of_runs(ids)
    scores = [0.0]
    for m in range(1, len(ids)):
        run = tuple(ids[len(ids) - m :])
        paths = {run: 1.0}
        score = 0.0
        for _ in range(min(m, count)):  # follow every most frequent child
            (above, probability), *others = paths.items()
            children = {t: runs[(*above, t)] for t in range(4) if runs[(*above, t)]}
            if others or not children:
                break
            most = max(children.values())
            heads = [t for t, c in children.items() if c == most]
            probability *= most / (runs[above] - (above == run))  # its own end has nothing after it
            if probability < 0.1 or len(heads) > 1:
                break
            paths = {(*above, heads[0]): probability}
            score += probability
        scores.append(score)
    return max(scores)


def drafter_of(ids: list[int], memory: SuffixMemory | None = None) -> SuffixDrafter:
    drafter = SuffixDrafter(memory)
    drafter.begin(ids, GREEDY)
    return drafter


@given(ids=ids_lists, count=st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_drafts_have_the_counts_of_a_trie(ids: list[int], count: int) -> None:
    proposal = drafter_of(ids).propose(count)
    runs = counts_of_runs(ids)
    assert proposal.expected_accepted >= reference_best(ids, count) - 1e-9
    assert len(proposal.ids) <= count
    if proposal.ids:  # some match explains every probability
        assert any(
            all(
                abs(
                    runs[(*tail, *proposal.ids[: i + 1])] / (runs[(*tail, *proposal.ids[:i])] - (i == 0))
                    - proposal.probabilities[i]
                )
                < 1e-9
                for i in range(len(proposal.ids))
            )
            for m in range(1, len(ids))
            if runs[(*(tail := tuple(ids[-m:])), *proposal.ids)]
        )


@given(
    texts=st.lists(ids_lists, max_size=3), ids=ids_lists, count=st.integers(1, 12), is_own_end=st.booleans()
)
@settings(max_examples=200, deadline=None)
def test_all_lengths_at_once_are_the_best_of_each_alone(
    texts: list[list[int]], ids: list[int], count: int, is_own_end: bool
) -> None:
    tree = SuffixTree()
    for text in [*texts, ids] if is_own_end else texts:
        tree.append([SEPARATOR, *text])
    tail = np.array(ids, np.int32)
    best, best_score = None, 0.0
    for node in tree.find(tail, is_own_end=is_own_end):
        path = tree.path(node, min(count, node.match_tokens), 0.1)
        if path.score > best_score:
            best, best_score = path, path.score
    found = tree.best_path(tree.find(tail, is_own_end=is_own_end), lambda tokens: min(count, tokens), 0.1)
    assert (found and found[0]) == best


@given(ids=ids_lists, more=ids_lists, keep=st.integers(0, 60), width=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_going_back_is_as_if_it_had_never_gone_on(
    ids: list[int], more: list[int], keep: int, width: int
) -> None:
    drafter = drafter_of(ids)
    drafter.extend(more)
    kept = (ids + more)[: max(1, min(keep, len(ids) + len(more)))]
    drafter.rewind(len(kept))
    fresh = drafter_of(kept)
    assert drafter.propose(8, width) == fresh.propose(8, width)
    assert drafter.memory_bytes <= fresh.memory_bytes + 8 * 4096


@given(ids=ids_lists, width=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_side_nodes_come_after_their_parents_and_stay_in_width(ids: list[int], width: int) -> None:
    proposal = drafter_of(ids).propose(6, width)
    depths: list[int] = []
    for index, parent in enumerate(proposal.parents):
        assert parent < index
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    assert max(Counter(depths).values(), default=0) <= width
    assert len(set(zip(proposal.parents, proposal.ids, strict=True))) == len(proposal.ids)


def test_a_copied_text_is_drafted_from_its_first_copy() -> None:
    text = list(range(100, 200))
    assert drafter_of([*text, 7, *text[:10]]).propose(10).ids == tuple(text[10:20])


def test_a_long_request_stays_in_its_budget() -> None:
    drafter = SuffixDrafter(request_index_bytes=64 << 10)
    ids = np.random.default_rng(1).integers(0, 50, 30_000).tolist()
    drafter.begin(ids[:20_000], GREEDY)
    drafter.extend(ids[20_000:])
    assert drafter.memory_bytes - 4 * len(ids) <= 64 << 10
    drafter.rewind(1_000)  # before what is still indexed
    drafter.extend(ids[100:120])
    assert drafter.propose(5).ids == tuple(ids[120:125])


def test_a_memory_forgets_the_oldest_output_first() -> None:
    memory = SuffixMemory(budget_bytes=64 << 10)
    outputs = [list(range(1000 * i, 1000 * i + 60)) for i in range(40)]
    for output in outputs:
        memory.learn(output)
        assert memory.memory_bytes <= memory.budget_bytes
    assert drafter_of(outputs[-1][:8], memory).propose(4).ids == tuple(outputs[-1][8:12])
    assert drafter_of(outputs[0][:8], memory).propose(4).ids == ()


def test_nothing_of_one_user_shows_at_another() -> None:
    """Neither in what is proposed nor in the work of looking up."""
    prompt, answer = list(range(20)), list(range(50, 90))
    alice, bob, nobody = SuffixMemory(), SuffixMemory(), SuffixMemory()
    first = drafter_of(prompt, alice)
    first.extend(answer)
    first.end()
    again = drafter_of([*prompt, *answer[:5]], alice)
    assert again.propose(5).ids == tuple(answer[5:10])
    assert alice.places_looked_at > 0
    theirs = [drafter_of([*prompt, *answer[:5]], memory).propose(5) for memory in (bob, nobody)]
    assert theirs[0] == theirs[1]
    assert theirs[0].ids == ()
    assert bob.places_looked_at == nobody.places_looked_at == 0


def test_a_request_that_must_not_be_learnt_leaves_nothing() -> None:
    memory = SuffixMemory()
    drafter = drafter_of([1, 2], memory)
    drafter.extend([3, 4])
    drafter.end(learn=False)
    assert len(memory) == 0


def test_a_memory_is_read_back_by_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    memory = SuffixMemory(tokenizer="a")
    memory.learn([5, 6, 7, 8])
    memory.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    read = SuffixMemory.load(path, tokenizer="a")
    assert drafter_of([5, 6], read).propose(2).ids == (7, 8)
    with pytest.raises(ConfigError, match="another tokenizer"):
        SuffixMemory.load(path, tokenizer="b")
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="not a suffix memory"):
        SuffixMemory.load(path, tokenizer="a")


def test_names_of_drafters() -> None:
    assert make_drafter("none").propose(4).ids == ()
    assert make_drafter("suffix").source == make_drafter("auto").source == "suffix"
    for spec, message in (("modle", "unknown drafter"), ("model", "needs the model")):
        with pytest.raises(UsageError, match=message):
            make_drafter(spec)


def test_runs_do_not_reach_across_texts() -> None:
    tree = SuffixTree()
    tree.append([SEPARATOR, 1, 2, SEPARATOR, 3, 4])
    (node,) = tree.find(np.array([2], np.int32), is_own_end=False)
    assert tree.path(node, 3, 0.1).ids == ()
