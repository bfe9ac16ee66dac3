from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.engine.cache import BlockCache, IntegrityError
from jinn.ops.protocol import NO_ADAPTER

SIZE = 4


class Copies(list):
    def __call__(self, source, target):
        self.append((source, target))


def make_cache(num_blocks=16, quota=None):
    return BlockCache(num_blocks, SIZE, Copies(), quota)


def ids(*values):
    return np.array(values, np.int32)


def compute(cache, tenant, token_ids, *, chunk=3, beside=()):
    """A table that holds all of `token_ids`, computed in chunks."""
    token_ids = ids(*token_ids)
    table = cache.acquire(tenant, token_ids)
    assert cache.allocate(table, len(token_ids))
    while table.num_tokens < len(token_ids):
        cache.commit(table, token_ids[table.num_tokens : table.num_tokens + chunk])
        cache.check_integrity([table, *beside])
    return table


def remember(cache, tenant, token_ids):
    cache.release(compute(cache, tenant, token_ids))
    cache.check_integrity([])


def num_known(cache, tenant, token_ids):
    table = cache.acquire(tenant, ids(*token_ids))
    num_tokens = table.num_tokens
    cache.release(table)
    cache.check_integrity([])
    return num_tokens


@pytest.mark.parametrize("length", range(12))
def test_reuse_is_exact_to_the_token(length):
    cache = make_cache()
    remember(cache, "t", range(100, 110))
    assert num_known(cache, "t", [*range(100, 100 + length), 7, 8, 9, 10, 11]) == min(length, 10)
    assert num_known(cache, "t", range(100, 100 + length)) == min(length, 10)


def test_full_blocks_are_shared_and_partial_ones_copied():
    cache = make_cache()
    first = compute(cache, "t", range(10))
    second = cache.acquire("t", ids(*range(9), 99))
    assert second.blocks[:2].tolist() == first.blocks[:2].tolist()
    assert cache._copy_block == [(first.blocks[2], second.blocks[2])]
    assert first.blocks[2] != second.blocks[2]
    assert second.num_tokens == 9
    cache.check_integrity([first, second])


def test_a_block_is_shown_while_it_is_being_filled():
    cache = make_cache()
    table = cache.acquire("t", ids())
    assert cache.allocate(table, 8)
    for count, token_id in enumerate(range(50, 57)):
        cache.commit(table, ids(token_id))
        other = cache.acquire("t", ids(*range(50, 60)))
        assert other.num_tokens == count + 1
        cache.check_integrity([table, other])
        cache.release(other)


def test_the_same_tokens_computed_twice_are_kept_once():
    cache = make_cache()
    first, second = cache.acquire("t", ids()), cache.acquire("t", ids())
    for table in (first, second):
        assert cache.allocate(table, 6)
    for table in (first, second):
        cache.commit(table, ids(1, 2, 3, 4, 5, 6))
        cache.check_integrity([first, second])
    assert first.blocks[0] == second.blocks[0]  # the second's own was freed
    assert first.blocks[1] != second.blocks[1]  # each goes on filling its own
    cache.commit(second, ids(7))  # now the second knows more
    assert num_known_beside(cache, [first, second], [1, 2, 3, 4, 5, 6, 7, 8]) == 7
    cache.release(first)
    cache.release(second)
    cache.check_integrity([])
    assert cache.num_cached_blocks == 2


def num_known_beside(cache, tables, token_ids):
    table = cache.acquire("t", ids(*token_ids))
    cache.check_integrity([*tables, table])
    num_tokens = table.num_tokens
    cache.release(table)
    return num_tokens


def test_tenants_never_share():
    cache = make_cache()
    remember(cache, "a", range(10))
    assert num_known(cache, "b", range(10)) == 0
    assert num_known(cache, "a", range(10)) == 10
    assert num_known(cache, "", range(10)) == 0


def test_adapters_never_share():
    cache = make_cache(num_blocks=32)
    for adapter in (NO_ADAPTER, 0, 1):
        assert cache.match_length("t", ids(*range(10)), adapter) == 0
        table = cache.acquire("t", ids(*range(10)), adapter)
        assert table.num_tokens == 0
        assert cache.allocate(table, 10)
        cache.commit(table, ids(*range(10)))
        cache.check_integrity([table])
        cache.release(table)
        assert cache.match_length("t", ids(*range(10)), adapter) == 10
    assert cache.num_cached_blocks == 9
    cache.check_integrity([])


def test_a_quota_is_of_all_adapters_together():
    cache = make_cache(num_blocks=32, quota=4)
    for adapter in (NO_ADAPTER, 0, 1):
        table = cache.acquire("t", ids(*range(8)), adapter)
        assert cache.allocate(table, 8)
        cache.commit(table, ids(*range(8)))
        cache.release(table)
    assert [cache.match_length("t", ids(*range(8)), adapter) for adapter in (NO_ADAPTER, 0, 1)] == [0, 8, 8]
    cache.check_integrity([])


def test_a_tenant_without_blocks_is_forgotten():
    cache = make_cache()
    for tenant in range(100):
        num_known(cache, str(tenant), range(10))
    remember(cache, "a", range(10))
    cache.evict(16)
    assert not cache._trees


def test_eviction_takes_what_was_used_least_recently_and_leaves_first():
    cache = make_cache(num_blocks=9)
    for start in (0, 100, 200):
        remember(cache, "t", range(start, start + 12))
    num_known(cache, "t", range(12))  # now used most recently, so the others go first
    left = []
    for _ in range(9):
        cache.evict(1)
        cache.check_integrity([])
        first_ids = [int.from_bytes(node.key[:4], "big") for node in cache._unheld]
        left.append(tuple(sum(start <= i < start + 12 for i in first_ids) for start in (0, 100, 200)))
    assert left[:6] == [(3, 2, 3), (3, 1, 3), (3, 0, 3), (3, 0, 2), (3, 0, 1), (3, 0, 0)]
    assert left[6:] == [(2, 0, 0), (1, 0, 0), (0, 0, 0)]


def test_leaves_are_evicted_before_what_they_hang_on():
    cache = make_cache()
    remember(cache, "t", range(12))
    for expected in (8, 4, 0):
        cache.evict(1)
        assert num_known(cache, "t", range(12)) == expected


def test_taking_a_copy_does_not_evict_its_source():
    cache = make_cache(num_blocks=2)
    remember(cache, "t", range(3))
    table = cache.acquire("t", ids(0, 1, 9))
    assert table.num_tokens == 2
    cache.check_integrity([table])
    assert cache.allocate(table, 8)  # takes the source's block
    cache.check_integrity([table])


def test_no_copy_where_there_is_no_room():
    cache = make_cache(num_blocks=1)
    remember(cache, "t", range(3))
    table = cache.acquire("t", ids(0, 1, 9))
    assert table.num_tokens == 0
    assert not cache._copy_block
    assert cache.allocate(table, 3)
    cache.check_integrity([table])


def test_allocation_is_all_or_nothing():
    cache = make_cache(num_blocks=4)
    held = compute(cache, "t", range(8))
    table = cache.acquire("t", ids(50))
    assert not cache.allocate(table, 12)
    assert table.num_blocks == 0
    assert not cache.allocate(table, 8, num_spare_blocks=1)
    assert cache.allocate(table, 8)
    cache.check_integrity([held, table])


def test_a_quota_bounds_what_a_tenant_keeps():
    cache = make_cache(num_blocks=32, quota=3)
    remember(cache, "a", range(12))
    remember(cache, "b", range(12))
    remember(cache, "b", range(100, 112))
    assert num_known(cache, "a", range(12)) == 12
    assert num_known(cache, "b", range(100, 112)) == 12
    assert num_known(cache, "b", range(12)) == 0
    assert cache.num_cached_blocks == 6


def test_release_without_keeping_drops_all_that_nobody_else_holds():
    cache = make_cache()
    remember(cache, "t", [*range(8), 20, 21])
    neighbour = compute(cache, "t", [0, 1, 2, 3, 9])
    failed = compute(cache, "t", [*range(8), 30, 31, 32, 33, 34], beside=[neighbour])
    cache.release(failed, keep=False)
    cache.check_integrity([neighbour])
    cache.release(neighbour)
    assert num_known(cache, "t", [*range(8), 20, 21]) == 4
    assert num_known(cache, "t", [0, 1, 2, 3, 9]) == 5


def test_a_long_chain_below_a_failure_is_dropped():
    cache = BlockCache(5000, 1, Copies())
    remember_long = compute(cache, "t", range(4000), chunk=4000)
    cache.release(remember_long)
    failed = cache.acquire("t", ids(0))
    cache.release(failed, keep=False)
    cache.check_integrity([])
    assert cache.num_cached_blocks == 0


short_text = st.lists(st.integers(0, 2), max_size=14)


@given(st.lists(short_text, max_size=8), short_text, st.integers(1, 5))
def test_what_is_known_is_the_longest_common_prefix(texts, query, chunk):
    cache = BlockCache(64, SIZE, Copies())
    for text in texts:
        cache.release(compute(cache, "t", text, chunk=chunk))
    expected = max((common_prefix(text, query) for text in texts), default=0)
    assert num_known(cache, "t", query) == expected


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def root_of(tree):
    return tree.roots[NO_ADAPTER]


def corrupt_lose_block(cache, table):
    cache._free.pop()


def corrupt_free_twice(cache, table):
    cache._free.append(cache._free[0])


def corrupt_free_held(cache, table):
    cache._free.append(int(table.blocks[0]))


def corrupt_holders(cache, table):
    table.node.num_holders += 1


def corrupt_not_evictable(cache, table):
    cache._unheld.popitem()


def corrupt_evict_held(cache, table):
    cache._unheld[table.node] = None


def corrupt_tokens(cache, table):
    table.tail.key = b"\0\0\0\1" * 5


def corrupt_order(cache, table):
    root_of(table.node.tree).children.reverse()


def corrupt_two_trees(cache, table):
    root_of(cache._trees["thief"]).children.append(table.node)


def corrupt_same_block(cache, table):
    root_of(cache._trees["thief"]).children[0].block = table.node.block


def corrupt_eviction_order(cache, table):
    cache._unheld.move_to_end(next(iter(cache._unheld)))
    tree = cache._trees["thief"]
    tree.unheld.move_to_end(next(iter(tree.unheld)))


def corrupt_table(cache, table):
    table.blocks[0] = cache._free[0]


def corrupt_lose_table(cache, table):
    table.node.tree.num_tables += 1


CORRUPTIONS = [value for name, value in list(globals().items()) if name.startswith("corrupt_")]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_integrity_notices(corrupt):
    cache = make_cache()
    remember(cache, "thief", range(8))
    remember(cache, "t", range(50, 60))
    table = compute(cache, "t", range(6))
    cache.check_integrity([table])
    corrupt(cache, table)
    with pytest.raises(IntegrityError):
        cache.check_integrity([table])


def test_integrity_notices_a_table_that_is_not_released():
    cache = make_cache()
    compute(cache, "t", range(6))
    with pytest.raises(IntegrityError):
        cache.check_integrity([])
