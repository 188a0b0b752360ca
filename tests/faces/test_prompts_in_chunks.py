"""Where the pages of a prompt lie that comes in chunks smaller than a large page."""

from __future__ import annotations

import pytest

from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import answer

K = 32
SHAPE = Shape(full=K, state_k=1, num_large=20, context=512)


def larges_of(rig: Rig, prompt: list[int]) -> set[int]:
    """Large pages in which the small pages of a running prompt lie."""
    reqs = [*rig.scheduler.running_batch.reqs]
    (req,) = [req for req in reqs if list(req.origin_input_ids) == prompt]
    allocator = rig.pools.allocator
    pages = allocator.tables.pages(allocator.groups.row, req.kv.req_pool_idx, 0, len(prompt))
    return set((pages // K).tolist())


@pytest.mark.parametrize("chunk", [None, 8, 24], ids=["at once", "in eights", "in 24s"])
def test_it_gets_large_pages_to_itself_as_one_that_comes_at_once(chunk: int | None):
    with Rig(SHAPE, Settings(chunk=chunk, overlap=False)) as rig:
        rig.submit(answer([1], K // 4), 300)  # has begun a large page
        rig.turn(2)
        prompt = answer([0], 4 * K)
        rig.submit(prompt, 9)
        while not any(list(r.origin_input_ids) == prompt for r in rig.scheduler.running_batch.reqs):
            rig.turn()

        assert len(larges_of(rig, prompt)) == 4
