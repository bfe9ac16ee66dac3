"""Which block of the cache holds which tokens: prefix trees per tenant over reference-counted blocks.

A node of the tree is one block and the ids of the tokens computed in it. Blocks enter the tree as soon as
their tokens are computed, also while they are being filled, and stay when their sequence ends, until the
memory is needed. Full blocks are shared; of a block that matches only in part, or is still being filled, a
copy is taken. What adapters make of the same tokens differs, so each has a root of its own in its tenant's
tree. Knows neither requests nor models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from itertools import pairwise
from operator import attrgetter

import numpy as np

from jinn.ops.protocol import NO_ADAPTER, IntArray

_ID_BYTES = 4
_key = attrgetter("key")


class IntegrityError(RuntimeError):
    """The cache's books do not balance."""


class Node:
    """A block in a prefix tree. The root has no block."""

    __slots__ = ("block", "children", "key", "num_holders", "parent", "tree")

    def __init__(self, tree: PrefixTree, parent: Node | None, key: bytes, block: int) -> None:
        self.tree = tree
        self.parent = parent
        self.key = key  # its token ids, 4 bytes each, big-endian: byte order is id order
        self.block = block
        self.num_holders = 0  # sequences whose block table it is in
        self.children: list[Node] = []  # sorted by key


class PrefixTree:
    """One tenant's nodes, below a root for each adapter."""

    __slots__ = ("num_tables", "roots", "tenant", "unheld")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.roots: dict[int, Node] = {}
        self.num_tables = 0  # not yet released
        self.unheld: OrderedDict[Node, None] = (
            OrderedDict()
        )  # least recently used first, children before parents


class BlockTable:
    """What one sequence holds of the cache: the blocks of its tokens, in order."""

    __slots__ = ("_blocks", "node", "num_blocks", "num_nodes", "num_tokens", "tail", "tail_key")

    def __init__(self, root: Node) -> None:
        self._blocks: IntArray = np.empty(8, np.int32)
        self.num_blocks = 0
        self.num_tokens = 0  # computed
        self.node = root  # of the last full block
        self.num_nodes = 0  # full blocks
        self.tail_key = b""  # ids of the computed tokens after the last full block
        self.tail: Node | None = None  # the node of their block, where the tree has it

    @property
    def blocks(self) -> IntArray:
        """Block ids [num_blocks]."""
        return self._blocks[: self.num_blocks]

    def append(self, block: int) -> None:
        if self.num_blocks == len(self._blocks):
            self._blocks = np.concatenate((self._blocks, np.empty_like(self._blocks)))
        self._blocks[self.num_blocks] = block
        self.num_blocks += 1

    def enter(self, node: Node) -> None:
        """Make `node`, a child of the last full block's, the last."""
        self.node = node
        self.num_nodes += 1


class BlockCache:
    """Gives out the blocks `0` to `num_blocks - 1` of `block_size` tokens each.

    `copy_block(source, target)` copies the contents of a block at once. `tenant_quota_blocks` bounds what a
    tenant may keep for reuse beyond the blocks its sequences hold. What else belongs to a prefix is kept on
    its Node and freed in `_drop`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        copy_block: Callable[[int, int], None],
        tenant_quota_blocks: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key_bytes = block_size * _ID_BYTES  # of a full block
        self._copy_block = copy_block
        self._tenant_quota_blocks = tenant_quota_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._trees: dict[str, PrefixTree] = {}
        # Of all tenants, in the order of PrefixTree.unheld.
        self._unheld: OrderedDict[Node, None] = OrderedDict()

    @property
    def num_cached_blocks(self) -> int:
        """Blocks kept for reuse only."""
        return len(self._unheld)

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can be given out: free, or kept for reuse only."""
        return len(self._free) + len(self._unheld)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_length(self, tenant: str, token_ids: IntArray, adapter: int = NO_ADAPTER) -> int:
        """How many of the first tokens the tenant's tree knows; holds nothing."""
        tree = self._trees.get(tenant)
        node = None if tree is None else tree.roots.get(adapter)
        if node is None:
            return 0
        keys, start = _to_key(token_ids), 0
        while child := _child(node, keys[start : start + self._key_bytes]):
            start += len(child.key)
            node = child
        _, partial = _longest_match(node.children, keys[start : start + self._key_bytes])
        return (start + partial) // _ID_BYTES

    def acquire(self, tenant: str, token_ids: IntArray, adapter: int = NO_ADAPTER) -> BlockTable:
        """A table that holds the longest prefix of `token_ids` that the tenant's tree knows, to the token."""
        tree = self._trees.get(tenant)
        if tree is None:
            tree = self._trees[tenant] = PrefixTree(tenant)
        tree.num_tables += 1
        table = BlockTable(tree.roots.setdefault(adapter, Node(tree, None, b"", -1)))
        keys = _to_key(token_ids)
        start = 0
        while start + self._key_bytes <= len(keys):
            child = _child(table.node, keys[start : start + self._key_bytes])
            if child is None:
                break
            self._hold(child)
            table.append(child.block)
            table.enter(child)
            start += self._key_bytes
        self._copy_partial(table, keys[start : start + self._key_bytes])
        table.num_tokens = (start + len(table.tail_key)) // _ID_BYTES
        return table

    def allocate(self, table: BlockTable, num_tokens: int, *, num_spare_blocks: int = 0) -> bool:
        """Make room in the table for `num_tokens` tokens in all, and leave `num_spare_blocks` available.

        False, and nothing changes, where that cannot be done.
        """
        missing = self.num_blocks_for(num_tokens) - table.num_blocks
        if missing > 0 and missing > self.num_available_blocks - num_spare_blocks:
            return False
        for _ in range(missing):
            table.append(self._take())
        return True

    def commit(self, table: BlockTable, token_ids: IntArray) -> None:
        """Record that the table's next tokens, `token_ids`, are computed, and let others reuse them."""
        keys = table.tail_key + _to_key(token_ids)
        table.num_tokens += len(token_ids)
        start = 0
        while len(keys) - start >= self._key_bytes:
            self._complete_block(table, keys[start : start + self._key_bytes])
            start += self._key_bytes
        table.tail_key = keys[start:]
        self._publish_tail(table)

    def release(self, table: BlockTable, *, keep: bool = True) -> None:
        """Give up the table. Computed blocks stay for reuse, or with `keep=False` only those others hold."""
        tree = table.node.tree
        if keep:
            self._publish_tail(table)
        else:
            self._withdraw_tail(table)
        held = [table.tail] if table.tail else []
        node = table.node
        while node.parent:
            held.append(node)
            node = node.parent
        self._free.extend(table.blocks[len(held) :].tolist())
        for node in held:
            self._let_go(node)
            if not keep:
                self._drop_unheld(node)
        tree.num_tables -= 1
        if self._tenant_quota_blocks is not None:
            while len(tree.unheld) > self._tenant_quota_blocks:
                self._drop(next(iter(tree.unheld)))
        self._forget_if_empty(tree)

    def evict(self, num_blocks: int) -> None:
        """Free up to `num_blocks` of the blocks kept for reuse only, the least recently used first."""
        for _ in range(min(num_blocks, len(self._unheld))):
            self._drop(next(iter(self._unheld)))

    def _take(self) -> int:
        if not self._free:
            self.evict(1)
        return self._free.pop()

    def _copy_partial(self, table: BlockTable, key: bytes) -> None:
        """Give the table a copy of the block that shares the most of `key`, if one does and there is room."""
        source, length = _longest_match(table.node.children, key)
        if source is None:
            return
        self._hold(source)  # so that taking a block cannot evict it
        if self.num_available_blocks:
            block = self._take()
            self._copy_block(source.block, block)
            table.append(block)
            table.tail_key = key[:length]
        self._let_go(source)

    def _complete_block(self, table: BlockTable, key: bytes) -> None:
        """Enter the table's filled block as a node; if another sequence was first, use that one's instead."""
        self._withdraw_tail(table)
        block = int(table.blocks[table.num_nodes])
        node = _child(table.node, key)
        if node is None:
            node = self._insert(table.node, key, block)
        else:
            self._hold(node)
            self._free.append(block)
            table.blocks[table.num_nodes] = node.block
        table.enter(node)

    def _publish_tail(self, table: BlockTable) -> None:
        """Show the computed tokens of the table's unfilled block, unless another block shows the same."""
        self._withdraw_tail(table)
        _, length = _longest_match(table.node.children, table.tail_key)
        if length < len(table.tail_key):
            table.tail = self._insert(table.node, table.tail_key, int(table.blocks[table.num_nodes]))

    def _withdraw_tail(self, table: BlockTable) -> None:
        if table.tail:
            _detach(table.tail)
            table.tail = None

    def _insert(self, parent: Node, key: bytes, block: int) -> Node:
        """A new node with one holder. An unheld sibling that shows only its first tokens is dropped."""
        node = Node(parent.tree, parent, key, block)
        node.num_holders = 1
        index = bisect_left(parent.children, key, key=_key)
        parent.children.insert(index, node)
        if index and key.startswith((before := parent.children[index - 1]).key) and not before.num_holders:
            self._drop(before)
        return node

    def _hold(self, node: Node) -> None:
        if not node.num_holders:
            del self._unheld[node], node.tree.unheld[node]
        node.num_holders += 1

    def _let_go(self, node: Node) -> None:
        node.num_holders -= 1
        if not node.num_holders:
            self._unheld[node] = node.tree.unheld[node] = None

    def _drop(self, node: Node) -> None:
        """Remove an unheld node without children, and free its block."""
        _detach(node)
        del self._unheld[node], node.tree.unheld[node]
        self._free.append(node.block)
        self._forget_if_empty(node.tree)

    def _drop_unheld(self, node: Node) -> None:
        """Drop a node and all below it, but for what is held."""
        below = [node]
        for ancestor in below:
            below.extend(ancestor.children)
        for descendant in reversed(below):
            if not descendant.num_holders:
                self._drop(descendant)

    def _forget_if_empty(self, tree: PrefixTree) -> None:
        if not tree.num_tables and not any(root.children for root in tree.roots.values()):
            self._trees.pop(tree.tenant, None)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise IntegrityError naming the fault unless the books balance with `tables`, all those in use."""
        owners: dict[int, str] = dict.fromkeys(self._free, "free")
        _require(len(owners) == len(self._free), "a block is free twice")
        holders: Counter[Node] = Counter()
        num_tables: Counter[str] = Counter()
        for table in tables:
            num_tables[table.node.tree.tenant] += 1
            held = self._check_table(table)
            holders.update(held)
            for block in table.blocks[len(held) :].tolist():
                _claim(owners, block, "private")
        num_unheld = 0
        for tenant, tree in self._trees.items():
            _require(tree.num_tables == num_tables.pop(tenant, 0), f"tenant {tenant!r} has lost a table")
            num_unheld += self._check_tree(tree, owners, holders)
        _require(not num_tables, "a table belongs to a tenant without a tree")
        _require(not +holders, "a table holds a node that no tree has")
        _require(num_unheld == len(self._unheld), "the eviction order and the trees differ")
        _require(len(owners) == self.num_blocks, f"{self.num_blocks - len(owners)} blocks are lost")

    def _check_table(self, table: BlockTable) -> list[Node]:
        """The nodes that the table holds."""
        path: list[Node] = []
        node = table.node
        while node.parent:
            path.append(node)
            node = node.parent
        _require(node in table.node.tree.roots.values(), "a table's path does not reach its root")
        path.reverse()
        if table.tail:
            _require(table.tail.parent is table.node, "a tail hangs elsewhere than its table")
            _require(table.tail.key == table.tail_key, "a tail's tokens differ from its table's")
            path.append(table.tail)
        _require(table.num_nodes == len(path) - bool(table.tail), "a table's full blocks are miscounted")
        _require(
            [n.block for n in path] == table.blocks[: len(path)].tolist(),
            "a table's blocks differ from its nodes",
        )
        num_tokens = table.num_nodes * self.block_size + len(table.tail_key) // _ID_BYTES
        _require(num_tokens == table.num_tokens, "a table's tokens are miscounted")
        _require(self.num_blocks_for(num_tokens) <= table.num_blocks, "a table holds tokens without a block")
        return path

    def _check_tree(self, tree: PrefixTree, owners: dict[int, str], holders: Counter[Node]) -> int:
        """The number of unheld nodes."""
        unheld = set()
        stack = list(tree.roots.values())
        while stack:
            node = stack.pop()
            keys = [child.key for child in node.children]
            _require(all(a < b for a, b in pairwise(keys)), "a node's children are out of order or equal")
            for child in node.children:
                _require(child.parent is node and child.tree is tree, "a node hangs in two places")
                _require(0 < len(child.key) <= self._key_bytes, "a node's tokens do not fit its block")
                _require(
                    not child.children or len(child.key) == self._key_bytes, "an unfilled block has children"
                )
                _require(child.num_holders == holders.pop(child, 0), "a node's holders are miscounted")
                _claim(owners, child.block, f"tenant {tree.tenant!r}")
                if not child.num_holders:
                    _require(
                        not any(c.num_holders for c in child.children), "a held node hangs on an unheld one"
                    )
                    unheld.add(child)
            stack.extend(node.children)
        _require(unheld == set(tree.unheld), "a tenant's eviction order and tree differ")
        _require(unheld <= self._unheld.keys(), "the eviction order lacks a node")
        for order in (tree.unheld, self._unheld):
            rank = {node: i for i, node in enumerate(order)}
            _require(
                all(rank[node] < rank[node.parent] for node in unheld if node.parent in rank),
                "a node would be evicted before its children",
            )
        return len(unheld)


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise IntegrityError(fault)


def _claim(owners: dict[int, str], block: int, owner: str) -> None:
    if block in owners:
        raise IntegrityError(f"block {block} is {owner} and {owners[block]}")
    owners[block] = owner


def _to_key(token_ids: IntArray) -> bytes:
    return token_ids.astype(">i4").tobytes()


def _child(node: Node, key: bytes) -> Node | None:
    """The child with exactly these tokens."""
    index = bisect_left(node.children, key, key=_key)
    if index < len(node.children) and node.children[index].key == key:
        return node.children[index]
    return None


def _longest_match(nodes: list[Node], key: bytes) -> tuple[Node | None, int]:
    """The node that shares most of `key`, a neighbour of its place in sorted order, and the bytes shared."""
    index = bisect_left(nodes, key, key=_key)
    best: Node | None = None
    best_length = 0
    for node in nodes[max(index - 1, 0) : index + 1]:
        length = _common_length(node.key, key)
        if length > best_length:
            best, best_length = node, length
    return best, best_length


def _common_length(a: bytes, b: bytes) -> int:
    """Bytes of the ids that both begin with."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    differs = np.frombuffer(a, ">i4", size // _ID_BYTES) != np.frombuffer(b, ">i4", size // _ID_BYTES)
    return int(differs.argmax()) * _ID_BYTES


def _detach(node: Node) -> None:
    """Take a node out of its parent's children."""
    siblings = node.parent.children if node.parent else []
    index = bisect_left(siblings, node.key, key=_key)
    if index == len(siblings) or siblings[index] is not node:
        raise IntegrityError(f"block {node.block} is not where its tokens say")
    del siblings[index]
