"""The index of cached blocks equals a model made of sets, whatever happens to workers, and stays in its bound."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tandem_frontend.routing.block_table import SHARDS, BlockTable
from tandem_frontend.routing.prefix_index import PrefixIndex
from tandem_frontend.routing.prompt_blocks import PromptBlocks

from tandem.domain.kv_blocks import block_hashes
from tandem.domain.worker import Start
from tests.unit.support.examples import examples
from tests.unit.support.prefix_trees import Prefix, PrefixTree

A, B, C = ("prefill-0", 1), ("prefill-1", 1), ("decode-0", 1)
PROMPT = list(range(64))
BLOCKS_MAX = 24
WORKERS = st.integers(0, 3)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


def loaded(index: PrefixIndex, start: Start, tokens: list[int], size: int = 4) -> None:
    index.reset(start, size)
    index.add(start, block_hashes(tokens, size))
    index.complete(start)


def test_match_gives_each_worker_its_own_leading_tokens() -> None:
    index = PrefixIndex(1_000)
    loaded(index, A, PROMPT[:8])
    loaded(index, B, [*PROMPT[:20], 99, 99, 99, 99])
    loaded(index, C, [5, *PROMPT])
    assert index.match(PromptBlocks(PROMPT)) == {A: 8, B: 20}
    assert (index.block_count, index.trusted_count, index.suspected_count) == (23 - 2 + 1, 3, 0)


def test_match_leaves_out_the_last_token_which_is_always_computed() -> None:
    index = PrefixIndex(1_000)
    loaded(index, A, PROMPT)
    assert index.match(PromptBlocks(PROMPT)) == {A: 60}
    assert index.match(PromptBlocks([*PROMPT, 1])) == {A: 64}
    assert index.match(PromptBlocks([])) == {}


def test_match_with_different_block_sizes_asks_each_in_its_own() -> None:
    index = PrefixIndex(1_000)
    loaded(index, A, PROMPT, 4)
    loaded(index, B, PROMPT, 16)
    assert index.match(PromptBlocks(PROMPT[:50])) == {A: 48, B: 48}
    assert index.match(PromptBlocks(PROMPT[:47])) == {A: 44, B: 32}


@pytest.mark.parametrize("other", [{"cache_salt": "s"}, {"lora": "l"}], ids=["salt", "lora"])
def test_match_under_another_salt_or_adapter_finds_nothing(other: dict[str, str]) -> None:
    index = PrefixIndex(1_000)
    loaded(index, A, PROMPT)
    assert index.match(PromptBlocks(PROMPT, **other)) == {}
    index.add(A, block_hashes(PROMPT[:8], 4, **other))
    assert index.match(PromptBlocks(PROMPT, **other)) == {A: 8}


def test_a_worker_without_a_complete_snapshot_gets_no_credit() -> None:
    index, prompt = PrefixIndex(1_000), PromptBlocks(PROMPT)
    index.reset(A, 4)
    index.add(A, block_hashes(PROMPT, 4))
    assert index.match(prompt) == {}
    index.complete(A)
    assert index.match(prompt) == {A: 60}
    index.suspect(A)
    index.add(A, block_hashes(PROMPT, 4))
    index.complete(A)
    assert index.match(prompt) == {}
    assert (index.trusted_count, index.suspected_count) == (0, 1)


def test_a_prompt_that_is_cached_nowhere_costs_one_block_of_hashing() -> None:
    index, prompt = PrefixIndex(1_000), PromptBlocks(PROMPT)
    loaded(index, A, [7] * 64)
    assert index.match(prompt) == {}
    assert len(prompt.hashes(4, 0)) == 1
    loaded(index, A, PROMPT[:20])
    assert index.match(prompt) == {A: 20}
    assert len(prompt.hashes(4, 0)) == 8, "twice as deep each time: 1, 2, 4, 8"


def test_a_cache_that_is_not_closed_is_credited_up_to_the_hole_that_was_seen() -> None:
    index, hashes = PrefixIndex(1_000), block_hashes(PROMPT, 4)
    loaded(index, A, PROMPT)
    index.remove(A, hashes[5:6])
    loaded(index, B, PROMPT[:20])
    assert index.match(PromptBlocks(PROMPT)) == {A: 20, B: 20}


@given(
    depths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    exact_min=st.integers(1, 30),
    prompt_blocks=st.integers(1, 40),
)
@settings(max_examples=examples(100))
def test_the_workers_that_have_most_are_matched_exactly_and_the_others_with_half_at_least(
    depths: list[int], exact_min: int, prompt_blocks: int
) -> None:
    index, tokens = PrefixIndex(10_000, exact_min=exact_min), list(range(161))
    for number, depth in enumerate(depths):
        start = f"worker-{number}", 1
        index.reset(start, 4)
        index.add(start, block_hashes(tokens[: 4 * depth], 4))
        index.complete(start)
    found = index.match(PromptBlocks(tokens[: 4 * prompt_blocks + 1]))
    right = {(f"worker-{number}", 1): 4 * min(depth, prompt_blocks) for number, depth in enumerate(depths) if depth}
    assert found.keys() == right.keys()
    least = sorted(right.values(), reverse=True)[:exact_min][-1:]
    for start, count in found.items():
        assert right[start] / 2 <= count <= right[start]
        if right[start] >= least[0]:
            assert count == right[start]


def test_beyond_the_bound_the_largest_cache_gets_no_credit() -> None:
    index = PrefixIndex(20)
    loaded(index, A, PROMPT[:48])
    loaded(index, B, [1] * 28)
    assert index.overflow_count == 0
    assert not index.has_room(2)
    index.add(B, block_hashes([2] * 8, 4))
    assert (index.is_trusted(A), index.is_trusted(B), index.overflow_count) == (False, True, 1)
    assert index.match(PromptBlocks(PROMPT)) == {}
    index.add(B, block_hashes([3] * 4, 4))
    assert index.block_count == 10
    assert index.has_room(10)
    loaded(index, A, PROMPT[:40])
    assert index.match(PromptBlocks(PROMPT)) == {A: 40}


def test_a_table_whose_slots_were_released_gets_smaller_with_each_addition() -> None:
    table = BlockTable(swept_min=2 * SHARDS)
    old, kept = table.open_slot(), table.open_slot()
    hashes = [number << 44 for number in range(-50_000, 50_000)]
    table.add(old, hashes)
    table.add(kept, hashes[:1_000])
    table.release(old)
    rounds = 0
    while table.is_sweeping:
        table.sweep(1)
        rounds += 1
    assert rounds > 10, "a sweep is done in parts"
    assert len(table) == 1_000
    assert table.open_slot() == old, "and the slot can be used again"
    assert [table.holders(one) for one in hashes[:2]] == [1 << kept] * 2


class IndexMachine(RuleBasedStateMachine):
    """Random histories of four workers, with sweeps that take many additions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = BlockTable(swept_min=40)
        self.index = PrefixIndex(BLOCKS_MAX, self.table)
        self.epochs = [1] * 4
        self.trees: dict[Start, PrefixTree] = {}
        """Caches that the index applies changes of."""
        self.complete: set[Start] = set()
        self.overflow_count = 0

    def start(self, number: int) -> Start:
        return f"worker-{number}", self.epochs[number]

    @rule(number=WORKERS)
    def reset(self, number: int) -> None:
        start = self.start(number)
        self.trees[start] = PrefixTree(1 + number % 2)
        self.complete.discard(start)
        self.index.reset(start, 1 + number % 2)

    @rule(number=WORKERS)
    def finish(self, number: int) -> None:
        start = self.start(number)
        self.index.complete(start)
        if start in self.trees:
            self.complete.add(start)

    @rule(number=WORKERS, prompts=st.lists(TOKENS, min_size=1, max_size=3))
    def add(self, number: int, prompts: list[Prefix]) -> None:
        start, size = self.start(number), 1 + number % 2
        tree = self.trees.get(start, PrefixTree(size))
        self.index.add(start, [one for tokens in prompts for one in tree.store(tokens)])
        self.take_overflow()

    @rule(number=WORKERS, tokens=TOKENS)
    def remove(self, number: int, tokens: Prefix) -> None:
        start, size = self.start(number), 1 + number % 2
        tree = self.trees.get(start, PrefixTree(size))
        self.index.remove(start, tree.evict(tokens[: len(tokens) // size * size] or (0,) * size))

    @rule(number=WORKERS)
    def clear(self, number: int) -> None:
        start = self.start(number)
        if start in self.trees:
            self.trees[start].held.clear()
        self.index.clear(start)

    @rule(number=WORKERS)
    def suspect(self, number: int) -> None:
        self.forget(self.start(number))
        self.index.suspect(self.start(number))

    @rule(number=WORKERS)
    def restart(self, number: int) -> None:
        self.forget(self.start(number))
        self.index.drop(self.start(number))
        self.epochs[number] += 1

    @precondition(lambda self: self.table.is_sweeping)
    @rule()
    def sweep(self) -> None:
        self.index.sweep()
        self.take_overflow()

    def forget(self, start: Start) -> None:
        self.trees.pop(start, None)
        self.complete.discard(start)

    def take_overflow(self) -> None:
        """The index may give up a cache of its own: the largest, and only when there are too many blocks."""
        given_up = [start for start in self.trees if not self.index.is_followed(start)]
        assert len(given_up) == self.index.overflow_count - self.overflow_count
        for start in given_up:
            assert len(self.trees[start].held) == max(len(tree.held) for tree in self.trees.values())
            self.forget(start)
        self.overflow_count = self.index.overflow_count

    @rule(tokens=TOKENS)
    def match(self, tokens: Prefix) -> None:
        expected = {start: self.trees[start].cached_tokens(tokens) for start in self.complete}
        assert self.index.match(PromptBlocks(tokens)) == {start: count for start, count in expected.items() if count}

    @invariant()
    def counts_agree(self) -> None:
        assert self.index.trusted_count == len(self.complete)
        live = {one for tree in self.trees.values() for one in tree.hashes([*tree.held])}
        if self.table.is_sweeping:
            assert self.index.block_count >= len(live)
        else:
            assert self.index.block_count == len(live) <= BLOCKS_MAX


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=examples(300), stateful_step_count=60, deadline=None)
