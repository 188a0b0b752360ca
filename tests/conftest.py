"""Hypothesis profiles, and what the tests of allocator and trees share."""

import math
import os
from functools import cache
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    # Before any test module imports SGLang, which reads it once: the engines are forked from here.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from sglang_jenga.layers.full import Full, FullPolicy
from sglang_jenga.layers.window import WindowPolicy
from sglang_jenga.pages.allocator import Allocator
from sglang_jenga.plan.spec import GroupPlan, LayerGroup, PoolPlan
from sglang_jenga.radix.node import TokenPages
from sglang_jenga.radix.tree import RadixTrees
from sglang_jenga.testing.launcher import shared_launcher, write_model

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=100,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
# A part of what CI tries, from the same seeds: a taste of every random test in a minute.
settings.register_profile(
    "fast",
    settings.get_profile("ci"),
    max_examples=15,
    stateful_step_count=30,
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


def pytest_addoption(parser):
    parser.addoption("--wide", action="store_true", help="cells of tables that CI leaves out, too")


def pytest_collection_modifyitems(config, items):
    if not config.option.wide:
        left_out = [item for item in items if item.get_closest_marker("wide")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("wide")]


def pytest_collection_finish(session):
    """Start the process that resolves configurations at once: it imports SGLang while the tests
    before those that ask it run."""
    asked = any("launcher" in getattr(item, "fixturenames", ()) for item in session.items)
    if asked and not session.config.option.collectonly:
        shared_launcher()


def tries(count: int) -> int:
    """So many rounds of a test that draws its own numbers, or the profile's share of them."""
    return max(1, count * settings.default.max_examples // 100)


@pytest.fixture(scope="module")
def launcher():
    """A process with the real plugins that resolves SGLang configurations."""
    return shared_launcher()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a Llama's config and no weights: enough for whatever stops before loading."""
    return write_model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", "llama")


@pytest.fixture(scope="module")
def prepared(request, tmp_path_factory):
    """What the module's ``prepare(family, folder)`` returns, made once a family."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda family: request.module.prepare(family, folder))


def plan_of(packings: tuple[int, ...], num_large: int) -> PoolPlan:
    """Plan from the small pages per large page of each group; small pages of a few bytes.

    ``plan_of((2, 3), 4)`` is four large pages of 6 bytes; group 0 has small pages of 3 bytes,
    group 1 of 2.
    """
    large_page_bytes = math.lcm(*packings)
    groups = tuple(
        GroupPlan(LayerGroup(Full(), (i,), large_page_bytes // k), large_page_bytes // k, k)
        for i, k in enumerate(packings)
    )
    return PoolPlan(groups, large_page_bytes, num_large)


class RecordingAllocator(Allocator):
    """Remembers what was evicted, in order."""

    def __init__(self, plan):
        super().__init__(plan)
        self.evicted = []

    def evict(self, extent):
        super().evict(extent)
        self.evicted += [(extent.group_id, small_id) for small_id in extent.ids.tolist()]


class World:
    """Trees of one full group and the given policies; every small page is a large page alone.

    A number stands for a window of that reach, in tokens. Keys are short, so no grace is given.
    """

    def __init__(self, *policies, tokens_per_page=1, grace_tokens=0, num_large=256, **options):
        self.tpp = tokens_per_page
        policies = [WindowPolicy(item) if isinstance(item, int) else item for item in policies]
        self.allocator = RecordingAllocator(plan_of((1,) * (1 + len(policies)), num_large))
        self.trees = RadixTrees(
            [FullPolicy(), *policies],
            tokens_per_page,
            self.allocator,
            grace_tokens=grace_tokens,
            **options,
        )

    def fresh(self, group_id, count):
        need = [[count if group == group_id else 0] for group in range(len(self.trees.policies))]
        return self.allocator.alloc(["request"], need)[group_id]

    def insert(self, key, alive_from=None, start=None, namespace=None, states=(), forks=()):
        """Insert a key with fresh pages from ``alive_from[g]`` small pages on, behind ``start``;
        a state group offers pages for the prefix lengths ``states``, of which ``forks`` are where
        requests are known to part."""
        start = self.trees.root if start is None else start
        pages, offers = [], []
        for group_id, policy in enumerate(self.trees.policies):
            if policy.per_prefix:
                ids = self.fresh(group_id, len(states))
                offers.append(dict(zip(states, ids.tolist(), strict=True)))
                pages.append(ids)
                continue
            first = max(alive_from[group_id] if alive_from else 0, start.end // self.tpp)
            ids = self.fresh(group_id, key.size // self.tpp - first)
            offers.append(TokenPages(first * self.tpp, ids))
            pages.append(np.concatenate([np.zeros(first, dtype=np.int64), ids]))
        outcome = self.trees.insert(start, namespace, key, offers, forks=forks)
        self.check()
        return outcome, pages

    def cache(self, key, *maps):
        """Leave the window groups with the pages marked ``x`` in ``maps`` along ``key``."""
        node = None
        for at in range(len(maps[0])):
            alive = [at] + [at if marks[at] == "x" else at + 1 for marks in maps]
            node = self.insert(key[: (at + 1) * self.tpp], alive, start=node)[0].node

    def hit(self, key, namespace=None):
        """Length of the joint hit in tokens."""
        node = self.trees.match(namespace, key).node
        self.check()
        return node.end

    def evict(self, count=1 << 20):
        """Empty ``count`` large pages; return what went as (group, small page of the key)."""
        position_of = {
            (group_id, small_id): node.begin // self.tpp + i
            for node in self.trees.nodes()
            for group_id, extent in enumerate(node.extents)
            if extent is not None
            for i, small_id in enumerate(extent.ids.tolist())
        }
        before = len(self.allocator.evicted)
        self.trees.evict_large(count)
        self.check()
        return [(group, position_of[group, i]) for group, i in self.allocator.evicted[before:]]

    def check(self):
        self.trees.check()
        self.allocator.check(self.trees.extents())


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 50_000, count)


def fork(key, at, length, seed=1):
    """A key that shares exactly the first ``at`` tokens with another."""
    rest = tokens(length - at, seed)
    if at < key.size and rest.size:
        rest[0] = key[at] + 1
    return np.concatenate([key[:at], rest])
