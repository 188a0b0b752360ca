"""Chunked local attention through SGLang's scheduler: what dies at a boundary, and what it hits."""

from __future__ import annotations

import pytest

from sglang_jenga.layers.chunked import Chunked
from sglang_jenga.testing.context import Settings
from tests.faces.pools import Shape
from tests.faces.rig import Rig
from tests.faces.symbols import WrongRead, answer

CHUNK = 8
SHAPE = Shape(full=3, window_k=2, window=CHUNK, sliding="chunked", num_large=80)
PROMPT = answer([0], 3 * CHUNK - 1)[: 3 * CHUNK - 1]


def chunk_pages(rig: Rig) -> int:
    """Small pages of the chunked group that requests hold or the trees have."""
    core = rig.pools.allocator.core
    return core.num_used[1] + core.num_cached[1]


def test_a_prefix_that_ends_at_a_boundary_is_a_hit_with_none_of_its_chunks_cached():
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    with Rig(SHAPE, Settings()) as rig:
        rig.ask([*PROMPT, 1], 2)
        rig.pools.cache.evict(EvictParams(num_tokens=0, swa_num_tokens=1 << 20))
        assert rig.pools.cache.swa_evictable_size() == 0

        hit = rig.ask([*PROMPT, 1, 2, 2, 0], 2).hit

        assert hit == len(PROMPT) + 1, "three whole chunks"


def test_inside_a_chunk_a_hit_needs_the_chunk_from_its_beginning_on():
    with Rig(SHAPE, Settings()) as rig:
        rig.ask(PROMPT, 1)
        inside = 2 * CHUNK + 5
        assert rig.ask([*PROMPT[:inside], (PROMPT[inside] + 1) % 3, 0], 1).hit == inside


def test_a_chunk_is_given_back_as_a_whole_when_memory_is_short():
    with Rig(SHAPE, Settings(radix=False)) as rig:
        rid = rig.submit(PROMPT, 2 * CHUNK)
        rig.turn(CHUNK)

        rig.slide(exactly=True)

        (req,) = rig.scheduler.running_batch.reqs
        # Of the tokens before the next one, those of its own chunk are left.
        assert chunk_pages(rig) == req.kv.kv_allocated_len - (req.seqlen - 1) // CHUNK * CHUNK
        rig.run()
        assert rig.ended(rid).tokens == answer(PROMPT, 2 * CHUNK, (None, None))


def test_a_chunk_that_is_given_back_too_early_is_seen(monkeypatch):
    with Rig(SHAPE, Settings(radix=False)) as rig:
        rig.submit(PROMPT, 2 * CHUNK)
        rig.turn(CHUNK)
        monkeypatch.setattr(Chunked, "dead", lambda self, length: (0, length - 1))
        rig.slide(exactly=True)
        with pytest.raises(WrongRead):
            rig.turn(CHUNK)
