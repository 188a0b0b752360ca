"""Kernels that load whole blocks of a window layer's keys and mask them meet numbers only.

FlashAttention 3 and 4 translate a request's whole row to window slots, and load the block that the
window's left edge lies in from its first position on: also positions whose window pages have gone
back. 0 times what lies there has to be 0, so no state may lie there.
"""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import torch

from sglang_jenga.serving.slot_map import SlotMap
from sglang_jenga.testing.context import Settings
from tests.faces.pools import Pools, Shape
from tests.faces.rig import Rig

BLOCK = 16  # keys that the kernel loads at a time
BOTH = Shape(full=4, window_k=1, window=6, state_k=1, num_large=40, num_rows=4)
WINDOW, STATE = 1, 2


def loaded(pools: Pools, req) -> np.ndarray:
    """Window slots that the kernel loads for the request's last token, those that it masks too."""
    length = req.kv.kv_allocated_len
    slots = pools.rows.req_to_token[req.kv.req_pool_idx, :length].long()
    edge = max(0, length - BOTH.window)
    return pools.allocator.slot_maps[WINDOW].tensor[slots[edge - edge % BLOCK :]].numpy()


def formats(pools: Pools, slots: np.ndarray) -> Counter:
    """Whose bytes lie in these window slots by the books: of "states", or "numbers"."""
    item, found = pools.plan.groups[WINDOW], Counter()
    for slot in slots.tolist():
        begin = slot * item.padded_entry_bytes
        null = begin < pools.plan.groups[WINDOW].small_page_bytes
        large = begin // pools.plan.large_page_bytes
        owner = pools.allocator.core.large.owner[large]
        found["states" if owner == STATE and not null else "numbers"] += 1
        found["null"] += null
    return found


def seen_in_forwards() -> Counter:
    """What all forwards of a busy little server load at the edges of windows."""
    found = Counter()
    with Rig(BOTH, Settings(), check=False) as rig:
        forward = rig.scheduler.model_worker.forward_batch_generation

        def watched(batch, **options):
            for req in batch.reqs:
                found.update(formats(rig.pools, loaded(rig.pools, req)))
            return forward(batch, **options)

        rig.scheduler.model_worker.forward_batch_generation = watched
        rig.submit([1, 2, 1, 2], 60)  # its windows go back while others want states
        for number in range(8):
            rig.submit([number % 3, number % 2, 0, 0], 4)
            rig.turn(6)
        rig.run()
    return found


def test_no_state_lies_where_a_block_at_the_edge_of_a_window_is_loaded():
    found = seen_in_forwards()

    assert found["numbers"] > 500 and found["null"] > 100
    assert found["states"] == 0


def test_it_would_be_seen_if_slots_went_on_leading_to_pages_that_went_back():
    with mock.patch.object(SlotMap, "part", lambda *_: None):
        assert seen_in_forwards()["states"] > 0


def test_masked_attention_over_a_block_is_finite_only_without_states():
    """Why: float32 states read as bfloat16 keys hold NaN, and the mask does not take it out."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randint(0, 1 << 32, (64, 32), generator=generator).to(torch.uint32)
    q = torch.randn(64, generator=generator)

    def attend(masked: torch.Tensor) -> torch.Tensor:
        keys = torch.cat([masked, torch.randn(8, 64, generator=generator)])
        hidden = torch.arange(len(keys)) < len(masked)
        weights = (keys @ q).masked_fill(hidden, -torch.inf).softmax(0)
        return weights @ keys

    assert attend(state.view(torch.bfloat16).float()).isnan().any()
    assert attend(torch.zeros(64, 64)).isfinite().all()
