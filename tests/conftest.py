"""Hypothesis profiles, and what the tests of allocator and trees share."""

import math
import os
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    # Before any test module imports SGLang, which reads it once: the engines are forked from here.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from sglang_jenga.radix.policy import FullPolicy, WindowPolicy
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.spec import GroupPlan, LayerGroup, PoolPlan
from tests.launcher import shared_launcher, write_model

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    derandomize=False,
    deadline=None,
    max_examples=1000,
    stateful_step_count=100,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="module")
def launcher():
    """A process with the real plugins that resolves SGLang configurations."""
    return shared_launcher()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama's config and no weights: enough for whatever stops before loading."""
    return write_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", "llama")


def plan_of(packings: tuple[int, ...], num_large: int) -> PoolPlan:
    """Plan from the small pages per large page of each group; small pages of a few bytes.

    ``plan_of((2, 3), 4)`` is four large pages of 6 bytes; group 0 has small pages of 3 bytes,
    group 1 of 2.
    """
    large_page_bytes = math.lcm(*packings)
    groups = tuple(
        GroupPlan(LayerGroup("full", (i,), large_page_bytes // k), large_page_bytes // k, k)
        for i, k in enumerate(packings)
    )
    return PoolPlan(groups, large_page_bytes, num_large)


class Pages:
    """Plays the allocator: hands out ids, checks every transition, remembers what was evicted."""

    def __init__(self):
        self.state = {}
        self.evicted = []

    def fresh(self, group_id, count):
        first = len(self.state) + 1
        for small_id in range(first, first + count):
            self.state[group_id, small_id] = "used"
        return np.arange(first, first + count, dtype=np.int64)

    def _move(self, group_id, small_ids, before, after):
        for small_id in small_ids.tolist():
            assert self.state[group_id, small_id] == before
            self.state[group_id, small_id] = after

    def cache(self, group_id, small_ids):
        self._move(group_id, small_ids, "used", "cached")

    def pin(self, group_id, small_ids):
        self._move(group_id, small_ids, "cached", "used")

    def evict(self, group_id, small_ids):
        self._move(group_id, small_ids, "cached", "evicted")
        self.evicted.extend((group_id, small_id) for small_id in small_ids.tolist())


class World:
    """Trees of one full group and the given windows (their reach, in tokens)."""

    def __init__(self, *reaches, tokens_per_page=1):
        self.tpp = tokens_per_page
        self.pages = Pages()
        policies = [FullPolicy(), *(WindowPolicy(reach) for reach in reaches)]
        self.trees = RadixTrees(policies, tokens_per_page, self.pages)

    def insert(self, key, alive_from=None, skip=0, namespace=None):
        """Insert a key with fresh pages; ``alive_from`` and ``skip`` count small pages."""
        alive_from = alive_from or [skip] * len(self.trees.policies)
        pages = [self.pages.fresh(g, key.size // self.tpp) for g in range(len(alive_from))]
        starts = [begin * self.tpp for begin in alive_from]
        outcome = self.trees.insert(namespace, key, pages, starts, skip * self.tpp)
        self.trees.check()
        return outcome, pages

    def cache(self, key, *maps):
        """Leave the window groups with the pages marked ``x`` in ``maps`` along ``key``."""
        for at in range(len(maps[0])):
            alive = [at] + [at if marks[at] == "x" else at + 1 for marks in maps]
            self.insert(key[: (at + 1) * self.tpp], alive, skip=at)

    def hit(self, key, namespace=None):
        """Length of the joint hit in tokens."""
        node = self.trees.match(namespace, key)
        self.trees.check()
        return node.end

    def evict(self, count=None, quantum=1):
        """Evict ``count`` small pages of any group; return them as (group, first position)."""
        position_of = {
            (group_id, small_id): node.begin // self.tpp + i
            for node in self.trees.nodes()
            for group_id, ids in enumerate(node.pages)
            if ids is not None
            for i, small_id in enumerate(ids.tolist())
        }
        before = len(self.pages.evicted)
        goal = 1 << 40 if count is None else before + count
        self.trees.evict_until(lambda: len(self.pages.evicted) >= goal, [quantum] * 9)
        self.trees.check()
        return [(group, position_of[group, i]) for group, i in self.pages.evicted[before:]]


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 50_000, count)


def fork(key, at, length, seed=1):
    """A key that shares exactly the first ``at`` tokens with another."""
    rest = tokens(length - at, seed)
    if at < key.size and rest.size:
        rest[0] = key[at] + 1
    return np.concatenate([key[:at], rest])
