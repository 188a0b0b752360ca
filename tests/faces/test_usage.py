"""Token usage is the share of the pool's large pages that are in use."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

WINDOWS = Shape(window_k=3)
STATES = Shape(state_k=1)


def stats(rig: Rig):
    return rig.scheduler.pool_stats_observer.get_pool_stats()


def held(rig: Rig) -> float:
    """The share of the pool's bytes that requests hold, counted page by page."""
    core = rig.pools.allocator.core
    sizes = [item.small_page_bytes for item in core.plan.groups]
    held = sum(used * size for used, size in zip(core.num_used, sizes, strict=True))
    return held / core.plan.pool_bytes


@pytest.mark.parametrize("shape", [WINDOWS, STATES], ids=["windows", "states"])
def test_usage_is_what_requests_hold_and_a_large_page_or_two_of_each_group(shape: Shape):
    with Rig(shape, Settings(overlap=False)) as rig:
        assert stats(rig).get_max_pool_usage() == 0
        for text in range(3):
            rig.submit(answer([text], 12), 8)
        rig.turn(4)

        found = stats(rig)

        assert held(rig) > 0.1
        usage = found.get_max_pool_usage()
        assert held(rig) - 2 / shape.num_large <= usage
        assert (
            usage <= held(rig) + 3 * 2 * len(rig.pools.allocator.core.plan.groups) / shape.num_large
        )
        assert found.get_kv_token_stats()[1] == usage
        assert f"pool usage: {usage:.2f}" in found.get_decode_usage_msg_parts()
        rig.run()
        assert stats(rig).get_max_pool_usage() == 0, "cached prefixes are not in use"


def test_a_lone_group_has_the_usage_of_stock():
    with Rig(Shape(), Settings(overlap=False)) as rig:
        rig.submit(answer([0], 12), 8)
        rig.turn(4)

        found = stats(rig)

        assert type(found).__name__ == "PoolStats"
        assert found.get_max_pool_usage() == found.full_num_used / found.full_capacity > 0
        rig.run()
