"""KV events of nodes that are cut and joined: what is published is what the trees hold."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang_jenga.layers.cross import CrossPolicy
from sglang_jenga.layers.full import FullPolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.radix.node import Node, TokenPages
from sglang_jenga.radix.tree import RadixTrees
from tests.conftest import World, plan_of, tokens

pytest.importorskip("sglang")

NAMESPACE = (None, None)


class Index:
    """What a router builds from the events: every block that is stored, by its hash."""

    def __init__(self, page_size: int) -> None:
        from sglang.srt.mem_cache.events import KVCacheEventRecorder

        from sglang_jenga.serving.kv_events import EventPublisher

        self._recorder = KVCacheEventRecorder(enabled=True, page_size=page_size)
        self.num_joined = 0
        self._joined = EventPublisher.joined
        self.publisher = EventPublisher(self._recorder)
        self.publisher.joined = self._count
        self.blocks: dict[object, object] = {}  # a block's parent

    def _count(self, front: Node, back: Node) -> None:
        self.num_joined += 1
        self._joined(self.publisher, front, back)

    def read(self) -> None:
        for event in self._recorder.take():
            kind = type(event).__name__
            if kind == "BlockStored":
                parents = [event.parent_block_hash, *event.block_hashes]
                for parent, block in zip(parents, event.block_hashes, strict=False):
                    assert parent is None or parent in self.blocks, "a block without its parent"
                    self.blocks[block] = parent
            elif kind == "BlockRemoved":
                for block in event.block_hashes:
                    del self.blocks[block]
            else:
                self.blocks.clear()


def pages_of(nodes: list[Node]) -> int:
    return sum(node.extents[0].size for node in nodes)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_nodes_that_are_cut_and_joined_are_published_once(page_size: int, seed: int):
    rng = random.Random(seed)
    index = Index(page_size)
    world = World(
        3 * page_size, tokens_per_page=page_size, observer=index.publisher, num_large=1024
    )
    key = tokens(12 * page_size)
    for _ in range(60):
        length = rng.randrange(1, 12) * page_size
        rest = tokens(rng.randrange(4) * page_size, seed=rng.randrange(1, 4))
        path = np.concatenate([key[:length], rest])
        if rng.random() < 0.6:
            world.insert(path, namespace=NAMESPACE)
        world.hit(path, NAMESPACE)
        world.evict(rng.randrange(4))
        index.read()
        assert len(index.blocks) == pages_of(world.trees.nodes())
    assert index.num_joined
    world.evict()
    index.read()
    assert not index.blocks


def test_an_image_is_published_before_its_text_and_goes_with_it():
    index = Index(page_size=1)
    allocator = Allocator(plan_of((1, 1), 64))
    trees = RadixTrees([FullPolicy(), CrossPolicy()], 1, allocator, observer=index.publisher)
    for text in ([1, 2, 3], [1, 8, 9]):
        ids = allocator.alloc(["request"], [[3], [4]])
        offers = [TokenPages(4, ids[0]), TokenPages(0, ids[1])]
        trees.insert(trees.root, NAMESPACE, np.array([901] * 4 + text), offers, [4])
    index.read()
    assert len(index.blocks) == 4 + 5
    assert sum(parent is None for parent in index.blocks.values()) == 1

    trees.evict_small(1, 1)
    index.read()
    assert not index.blocks
